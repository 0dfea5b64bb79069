#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: onnxruntime.quantization.quantize_dynamic takes the Attention of ONNX (opset 23; query, key, value)
# for ONNX Runtime's own of that name (com.microsoft; input, weights, bias). It writes a QAttention with the query as the
# input and the key as weights. With keys and values of a cache, and so three outputs, loading the file fails; the float
# file runs. Leaving Attention out of op_types_to_quantize gives a file that runs.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1 sympy==1.14.0
cd "$place"
ORT_DISABLE_TELEMETRY=1 "$place/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.registry import IntegerOpsRegistry

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
heads, width = 2, 8
new, past = ["batch", heads, "new", width], ["batch", heads, "past", width]
reads = {"query": new, "key": new, "value": new, "past_key": past, "past_value": past}
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in reads.items()]
whole = ["batch", heads, "total", width]
makes = {"out": new, "present_key": whole, "present_value": whole}
outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in makes.items()]
node = helper.make_node(
    "Attention", ["query", "key", "value", "", "past_key", "past_value"], [value.name for value in outputs], is_causal=1,
)
model = helper.make_model(
    helper.make_graph([node], "step", inputs, outputs), opset_imports=[helper.make_opsetid("", 23)], ir_version=11,
)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float.onnx")
sizes = {"batch": 1, "new": 3, "past": 5}
feeds = {name: np.ones([sizes.get(dim, dim) for dim in dims], np.float32) for name, dims in reads.items()}


def runs(path):
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [array.shape for array in session.run(None, feeds)] == [(1, 2, 3, 8), (1, 2, 8, 8), (1, 2, 8, 8)]
    except Exception as error:
        print(f"{path}: {str(error)[:90]}...")
        return False


options = {"DefaultTensorType": TensorProto.FLOAT}
quantize_dynamic("float.onnx", "all.onnx", extra_options=options)
others = sorted({*IntegerOpsRegistry} - {"Attention"})
quantize_dynamic("float.onnx", "others.onnx", op_types_to_quantize=others, extra_options=options)
made = [(node.op_type, node.domain) for node in onnx.load("all.onnx").graph.node if "ttention" in node.op_type]
print("Attention of ONNX became", *made)
seen = {path: runs(path) for path in ("float.onnx", "all.onnx", "others.onnx")}
print(seen)
ok = seen == {"float.onnx": True, "all.onnx": False, "others.onnx": True} and made == [("QAttention", "com.microsoft")]
sys.exit(0 if ok else 1)
PY
