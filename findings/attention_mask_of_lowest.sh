#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: operator Attention (opset 23) with a float mask that is added to the scores. A row of the mask
# that is the same finite number throughout changes nothing in a softmax, so the result is the mean of the values. It is,
# for -1e9, for half of the lowest float32 and for the next float above the lowest; for exactly the lowest float32, which
# is what PyTorch models write into masks, the result is zeros.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1
ORT_DISABLE_TELEMETRY=1 "$place/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

TENSORS = (("q", [1, 1, 1, 4]), ("k", [1, 1, 3, 4]), ("v", [1, 1, 3, 4]), ("mask", [1, 1, 1, 3]))
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in TENSORS]
output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 4])
node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
graph = helper.make_graph([node], "attention", inputs, [output])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

lowest = np.finfo(np.float32).min
feeds = {"q": np.zeros((1, 1, 1, 4), np.float32), "k": np.zeros((1, 1, 3, 4), np.float32)}
feeds["v"] = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
mean, ok = feeds["v"].mean(2)[0, 0], True
print("onnxruntime", onnxruntime.__version__, "- mean of the values:", mean)
for what, number in (("-1e9", -1e9), ("half of the lowest", lowest / 2), ("one above the lowest", np.nextafter(lowest, 0)),
                     ("the lowest", lowest)):
    got = session.run(None, feeds | {"mask": np.full((1, 1, 1, 3), number, np.float32)})[0][0, 0, 0]
    print(f"{what:22} {got}")
    ok &= np.allclose(got, 0 if what == "the lowest" else mean)
sys.exit(0 if ok else 1)
PY
