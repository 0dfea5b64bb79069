#!/usr/bin/env bash
# ONNX 1.23.2, ONNX Runtime 1.31.1, CPU: Cast from float32 to 8-bit floats with saturate=0. What is too large becomes NaN of
# FLOAT8E4M3FN and infinity of FLOAT8E5M2, says the standard; so do onnx's own reference and ml_dtypes 0.6.0.
#
# ONNX Runtime: FLOAT8E4M3FN ends at 448, 465 to 479 become NaN, 480 to 495 become 448, and 496 and more NaN again.
# FLOAT8E5M2 ends at 57344, 61440 to 65535 become NaN, and 65536 and more infinity.
# With saturate=1, the default, all agree. QuantizeLinear does what Cast does.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.31.1
ORT_DISABLE_TELEMETRY=1 "$place/venv/bin/python" -W ignore - <<'PY'
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def cast_and_back(kind, saturate):
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=kind, saturate=saturate),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "cast", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


ok = True
print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__, "ml_dtypes", ml_dtypes.__version__)
for name, theirs, numbers in (
    ("FLOAT8E4M3FN", ml_dtypes.float8_e4m3fn, [448, 464, 465, 479, 480, 495, 496, 1000]),
    ("FLOAT8E5M2", ml_dtypes.float8_e5m2, [57344, 61439, 61440, 65535, 65536, 100000]),
):
    x = np.array(numbers, np.float32)
    print(f"{name:13}", *(f"{n:>7g}" for n in x))
    for saturate in (0, 1):
        built = cast_and_back(getattr(TensorProto, name), saturate)
        session = onnxruntime.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, {"x": x})[0]
        said = ReferenceEvaluator(built).run(None, {"x": x})[0].astype(np.float32)
        print(f"saturate={saturate}")
        for who, found in (("onnx", said), ("ml_dtypes", x.astype(theirs).astype(np.float32)), ("onnxruntime", got)):
            if not (saturate and who == "ml_dtypes"):  # which never saturates
                print(f"{who:>13}", *(f"{n:>7g}" for n in found))
        if saturate:
            ok &= np.array_equal(got, said)
        else:
            ok &= np.array_equal(x.astype(theirs).astype(np.float32), said, equal_nan=True)
            odd = slice(4, 6) if name == "FLOAT8E4M3FN" else slice(2, 4)
            same = np.ones(len(x), bool)
            same[odd] = False
            ok &= np.array_equal(got[same], said[same], equal_nan=True)
            ok &= bool((got[odd] == 448).all() if name == "FLOAT8E4M3FN" else np.isnan(got[odd]).all())
sys.exit(0 if ok else 1)
PY
