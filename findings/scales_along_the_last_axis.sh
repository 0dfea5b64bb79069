#!/usr/bin/env bash
# onnxruntime 1.31.1, CPU provider, one thread: a QuantizeLinear whose scales lie along the last axis of its input takes more
# than ten times as long as a Div by the same scales and a QuantizeLinear with a single scale of 1, which give the same codes.
# With the same scales along an axis in front of a long last one it takes no longer than the two nodes do. One would expect a
# fused node to be the faster one whatever the axis is.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise. Times are the least of many runs.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.22.0 onnxruntime==1.31.1
cd "$place"
"$place/venv/bin/python" - <<'PY'
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

print("onnxruntime", ort.__version__, "onnx", onnx.__version__)
generator = np.random.default_rng(0)


def run(nodes, constants, x):
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("q", TensorProto.INT8, x.shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    times = []
    for _ in range(60):
        started = time.perf_counter()
        (codes,) = session.run(None, {"x": x})
        times.append(time.perf_counter() - started)
    return 1e6 * min(times), codes


def both(shape, axis):
    x = generator.standard_normal(shape, dtype=np.float32)
    scales = generator.uniform(0.01, 0.03, shape[axis]).astype(np.float32)
    column = scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    fused, codes = run(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis)],
        {"s": scales, "z": np.zeros(shape[axis], np.int8)}, x,
    )
    apart, same = run(
        [helper.make_node("Div", ["x", "s"], ["d"]), helper.make_node("QuantizeLinear", ["d", "one", "z"], ["q"])],
        {"s": column, "one": np.float32(1), "z": np.int8(0)}, x,
    )
    print(f"{shape}, axis {axis}: QuantizeLinear {fused:.0f} us, Div and QuantizeLinear {apart:.0f} us, "
          f"codes equal: {np.array_equal(codes, same)}")
    return fused / apart, np.array_equal(codes, same)


last, same = both((1, 512, 192), 2)
front, also = both((1, 192, 512), 1)
sys.exit(0 if last > 10 and front < 2 and same and also else 1)
PY
