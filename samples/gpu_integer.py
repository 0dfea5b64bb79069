"""Which products of int8 codes ONNX Runtime's CUDA provider computes, and whether right: MatMulInteger by shape.

    python samples/gpu_integer.py

A line for each K and N: the numbers of rows M that fail, and those that give other sums than exact ones.
"""

import itertools

import qexport  # noqa: F401  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

ROWS = (1, 2, 3, 4, 8, 9, 16, 17, 27, 32, 33, 64, 128, 512)
INPUTS, OUTPUTS = (32, 64, 96, 128, 192, 256, 320, 576, 1536, 2048), (32, 64, 96, 128, 192, 320, 576, 768)

def main() -> None:
    random = np.random.default_rng(0)
    for k, n in itertools.product(INPUTS, OUTPUTS):
        weight = random.integers(-127, 128, (k, n)).astype(np.int8)
        session = session_of(weight)
        failed, wrong, reason = [], [], ""
        for m in ROWS:
            x = random.integers(-127, 128, (m, k)).astype(np.int8)
            try:
                got = session.run(None, {"x": x})[0]
            except Exception as error:
                failed.append(m)
                reason = str(error)[str(error).find("failure") :][:80]
                continue
            if not np.array_equal(got, x.astype(np.int32) @ weight.astype(np.int32)):
                wrong.append(m)
        print(
            f"K {k} N {n}: {'fails for M in ' + str(failed) if failed else 'runs'} {reason} wrong {wrong}", flush=True
        )


def session_of(weight: np.ndarray) -> ort.InferenceSession:
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", TensorProto.INT8, ["m", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["m", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, ["CUDAExecutionProvider"])


if __name__ == "__main__":
    main()
