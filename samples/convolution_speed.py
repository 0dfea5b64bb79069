"""Integer convolutions beside those of floats in ONNX Runtime, by channels and kernel: what the plan goes by.

    python samples/convolution_speed.py

One thread, processor time, medians over pairs of runs in turns. "alone" has QuantizeLinear in front and
DequantizeLinear behind, as between operators of floats; "inside" reads and writes codes, as between other integer
convolutions. Above 1 the integers are faster.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import qexport  # noqa: F401, isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime as ort

CHANNELS = (
    (1, 8), (3, 10), (3, 32), (3, 64), (8, 8), (10, 16), (16, 16), (16, 32), (24, 24), (32, 2), (32, 32), (32, 64),
    (64, 64), (128, 128),
)  # fmt: skip
KERNELS = (1, 3, 5, 7)
EACH_ALONE = (16, 32, 64, 128)  # channels of convolutions that read one channel for each they write
LEAST = 20.0  # million multiplications of what is measured


def model(inside: int, outside: int, kernel: int, size: int, kind: str, groups: int = 1) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.02), "z": np.uint8(128), "sw": np.full(outside, 0.01, np.float32),
        "zw": np.zeros(outside, np.int8),
        "q": random.integers(-127, 128, (outside, inside // groups, kernel, kernel)).astype(np.int8),
        "w": random.standard_normal((outside, inside // groups, kernel, kernel)).astype(np.float32),
    }  # fmt: skip
    pads = [kernel // 2] * 4
    if kind == "float":
        nodes, used = [helper.make_node("Conv", ["x", "w"], ["y"], pads=pads, group=groups)], {"w"}
    else:
        codes, out = ("x", "y") if kind == "inside" else ("c", "d")
        given = [codes, "s", "z", "q", "sw", "zw", "s", "z"]
        nodes = [helper.make_node("QLinearConv", given, [out], pads=pads, group=groups)]
        used = {"s", "z", "q", "sw", "zw"}
        if kind == "alone":
            nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"]))
            nodes.append(helper.make_node("DequantizeLinear", ["d", "s", "z"], ["y"]))
    dtype = TensorProto.UINT8 if kind == "inside" else TensorProto.FLOAT
    shapes = ([1, inside, size, size], [1, outside, size, size])
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in zip("xy", shapes, strict=True)]
    held = [numpy_helper.from_array(np.asarray(constants[name]), name) for name in sorted(used)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def ratios(inside: int, outside: int, kernel: int, size: int, rounds: int, groups: int = 1) -> dict[str, float]:
    """How many times as fast as the convolution of floats."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    runs = {}
    x = np.random.default_rng(1).standard_normal((1, inside, size, size)).astype(np.float32)
    codes = (np.clip(x, -2, 2) * 50 + 128).astype(np.uint8)
    for kind in ("float", "alone", "inside"):
        made = model(inside, outside, kernel, size, kind, groups).SerializeToString()
        runs[kind] = ort.InferenceSession(made, options), {"x": codes if kind == "inside" else x}
    count = max(1, round(LEAST * 1e6 * groups / (inside * outside * kernel**2 * size**2)))
    took: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds):
        for kind in runs if number % 2 else reversed(runs):
            session, feeds = runs[kind]
            began = time.process_time()
            for _ in range(count):
                session.run(None, feeds)
            took[kind].append(time.process_time() - began)
    return {
        kind: statistics.median(f / t for f, t in zip(took["float"][1:], took[kind][1:], strict=True))
        for kind in ("alone", "inside")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=56, help="rows and columns of the image")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print("| channels in, out | kernel | alone | inside |\n| --- | --- | --- | --- |")
    for inside, outside in CHANNELS:
        for kernel in KERNELS:
            found = ratios(inside, outside, kernel, given.size, given.rounds)
            print(f"| {inside}, {outside} | {kernel} | {found['alone']:.2f} | {found['inside']:.2f} |", flush=True)
    for channels in EACH_ALONE:
        for kernel in KERNELS[1:]:
            found = ratios(channels, channels, kernel, given.size, given.rounds, channels)
            print(f"| {channels}, each | {kernel} | {found['alone']:.2f} | {found['inside']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
