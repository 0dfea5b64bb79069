"""What a rotation in front of a down projection costs on the CPU, beside the projection itself.

    python samples/rotation_cost.py [--width 1536] [--out-features 576] [--rows 1 128] [--repeats 40]

The rotation is a product with two small matrices, Reshape, MatMul, MatMul, Reshape, as `rotation: {inputs: true}` has
it, for several ways to factor the width, 1 being a whole matrix. The projection is MatMulIntegerToFloat of inputs
rounded per token (w8a8_dyn), MatMulNBits of 4 bits (w4a16_g32) and a float32 MatMul, each as qexport exports it. Files
take turns in one process, one thread; medians of processor time, as shares of that of the integer projection.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

import qexport
from qexport.artifact import manifest as manifests
from qexport.quant.hadamard import factored_rotation, rotation
from qexport.runtime.session import open_session

PROJECTIONS = {"w8a8_dyn": "integer projection", "w4a16_g32": "4-bit projection", "float": "float projection"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--out-features", type=int, default=576)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    best = factored_rotation(given.width)
    sizes = dict.fromkeys([len(best[0]), *(a for a in (12, 24, 1) if given.width % a == 0)])
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        sessions = {f"rotation {a} x {given.width // a}": turning(given.width, a) for a in sizes}
        for scheme, name in PROJECTIONS.items():
            sessions[name] = projecting(Path(folder) / scheme, scheme, given.width, given.out_features)
        print("| | " + " | ".join(f"{rows} rows" for rows in given.rows) + " |")
        print("| --- " * (len(given.rows) + 1) + "|")
        times = [measured(sessions, given.width, rows, given.repeats) for rows in given.rows]
        for name in sessions:
            print(f"| {name} | " + " | ".join(f"{t[name] / t['integer projection']:.2f}" for t in times) + " |")


def turning(width: int, a: int) -> onnxruntime.InferenceSession:
    """A session of the rotation alone, of [1, rows, width]."""
    left, right = rotation(a).float().numpy(), rotation(width // a).float().numpy()
    make = onnx.helper
    nodes = [
        make.make_node("Reshape", ["x", "apart"], ["rows"]), make.make_node("MatMul", ["rows", "right"], ["half"]),
        make.make_node("MatMul", ["left", "half"], ["whole"]), make.make_node("Reshape", ["whole", "together"], ["y"]),
    ]  # fmt: skip
    if a == 1:
        nodes = [make.make_node("MatMul", ["x", "right"], ["y"])]
    constants = {
        "left": left.T.copy(), "right": right, "apart": np.array([0, 0, a, width // a]),
        "together": np.array([0, 0, width]),
    }  # fmt: skip
    ports = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "rows", width]) for name in "xy"]
    read = {name for node in nodes for name in node.input}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items() if name in read]
    model = make.make_model(make.make_graph(nodes, "rotation", ports[:1], ports[1:], tensors))
    model.ir_version, model.opset_import[0].version = 10, 21
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def projecting(folder: Path, scheme: str, width: int, out_features: int) -> onnxruntime.InferenceSession:
    """A session of a linear alone."""
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(width, out_features, bias=False))
    floats = qexport.Recipe(scheme="w8a8_dyn", overrides=[{"match": "*", "scheme": "float"}])
    recipe = floats if scheme == "float" else qexport.Recipe(scheme=scheme)
    x = torch.randn(1, 4, width)
    qexport.export(linear, recipe, out_dir=folder, example_inputs=(x,), dynamic_shapes=({1: "rows"},))
    return open_session(folder, manifests.load(folder), threads=1)


def measured(sessions: dict, width: int, rows: int, repeats: int) -> dict[str, float]:
    """Median processor time of each, in turns."""
    x = np.random.default_rng(0).standard_normal((1, rows, width)).astype(np.float32)
    inner = max(1, 256 // rows)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for repeat in range(repeats + 2):
        for name, session in sessions.items():
            port = session.get_inputs()[0].name
            begin = time.process_time()
            for _ in range(inner):
                session.run(None, {port: x})
            if repeat >= 2:
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
