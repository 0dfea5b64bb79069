"""Prompts through 4-bit weights alone: what each way of multiplying them costs, one linear, one thread, in turns.

    python samples/prefill_from_one_copy.py

For M tokens and a weight [N, K] in groups: MatMulNBits of 4 and of 8 bits (accuracy level 4), an int8 product whose
weight is int8 in memory (rows rounded by DynamicQuantizeLinear), and that product behind an expansion of 4-bit codes in
each call: by plain operators, by DequantizeLinear and QuantizeLinear of codes that lie [K, N], and of codes that lie
[N, K] as those of MatMulNBits do, which could be the same bytes of the file. Processor time in microseconds, medians.
"""

import argparse
import statistics
import time

import numpy as np

import qexport  # noqa: F401, isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

GROUP = 128
SHAPES = ((1536, 576), (576, 1536), (8192, 2048))
TOKENS = (128, 512, 2048)


class Graph:
    """Nodes in a row, and tensors."""

    def __init__(self):
        self.nodes, self.tensors = [], []

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(value, f"c{len(self.tensors)}"))
        return self.tensors[-1].name

    def given(self, value: np.ndarray) -> str:
        """A weight that no session may fold into what it makes of it."""
        name = self.constant(value)
        return self.op("Where", self.op("Cast", "never", to=TensorProto.BOOL), name, name)

    def session(self, k: int) -> ort.InferenceSession:
        self.nodes[-1].output[0] = "y"
        info = helper.make_tensor_value_info
        inputs = [info("x", TensorProto.FLOAT, ["m", k]), info("never", TensorProto.INT64, [1])]
        graph = helper.make_graph(self.nodes, "g", inputs, [info("y", TensorProto.FLOAT, None)], self.tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def integer_product(graph: Graph, weight: str, n: int) -> None:
    codes, scale, zero = (f"x_{part}" for part in ("codes", "scale", "zero"))
    graph.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], [codes, scale, zero]))
    whole = graph.op("MatMulInteger", codes, weight, zero)
    scaled = graph.op("Mul", graph.op("Cast", whole, to=TensorProto.FLOAT), scale)
    graph.op("Mul", scaled, graph.constant(np.full(n, 1e-3, np.float32)))


def ways(n: int, k: int) -> dict[str, tuple[ort.InferenceSession, int]]:
    """Sessions, and bytes of the weight."""
    random, found = np.random.default_rng(0), {}
    groups = -(-k // GROUP)
    scales = random.random((n, groups), np.float32)
    for bits in (4, 8):
        graph = Graph()
        packed = random.integers(0, 256, (n, groups, GROUP * bits // 8), dtype=np.uint8)
        graph.op(
            "MatMulNBits", "x", graph.constant(packed), graph.constant(scales.ravel()), domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=GROUP, accuracy_level=4,
        )  # fmt: skip
        found[f"MatMulNBits, {bits} bits"] = graph.session(k), packed.nbytes + scales.nbytes
    wide = random.integers(-127, 128, (k, n), dtype=np.int8)
    graph = Graph()
    integer_product(graph, graph.constant(wide), n)
    found["int8 in memory"] = graph.session(k), wide.nbytes

    # Codes of the first half of K in the low nibbles; each row times its share of the scale of its channel.
    half, share = random.integers(0, 256, (k // 2, n), dtype=np.uint8), np.full((k // 2, n), 1, np.float32)
    share = share[:: k // 2 // max(k // 2 // GROUP, 1)].copy()
    graph = Graph()
    source = graph.given(half)
    parts = []
    for nibble in (
        graph.op("BitwiseAnd", source, graph.constant(np.uint8(15))),
        graph.op("BitShift", source, graph.constant(np.uint8(4)), direction="RIGHT"),
    ):
        value = graph.op("Cast", nibble, to=TensorProto.FLOAT)
        rows = graph.constant(np.repeat(share, -(-(k // 2) // len(share)), axis=0)[: k // 2])
        value = graph.op("Mul", graph.op("Sub", value, graph.constant(np.float32(8))), rows)
        zero = graph.constant(np.int8(0))
        parts.append(graph.op("QuantizeLinear", value, graph.constant(np.float32(1)), zero))
    integer_product(graph, graph.op("Concat", *parts, axis=0), n)
    found["int8 expanded in the call, plain operators"] = graph.session(k), half.nbytes + scales.nbytes

    # DequantizeLinear has no reason to be folded where its scale is a value of the run.
    block = 64 if k % GROUP else GROUP
    for label, sizes, axis in (("[K, N]", (k, n), 0), ("[N, K]", (n, k), 1)):
        graph, blocks = Graph(), list(sizes)
        blocks[axis] //= block
        codes = random.integers(-8, 8, n * k)
        graph.tensors.append(helper.make_tensor("codes", TensorProto.INT4, sizes, codes.tolist()))
        scale = graph.given(random.random(blocks, np.float32))
        value = graph.op("DequantizeLinear", "codes", scale, axis=axis, block_size=block)
        zero = graph.constant(np.int8(0))
        expanded = graph.op("QuantizeLinear", value, graph.constant(np.float32(0.1)), zero)
        integer_product(graph, expanded if axis == 0 else graph.op("Transpose", expanded, perm=[1, 0]), n)
        found[f"int8 expanded in the call, codes {label}"] = graph.session(k), n * k // 2 + scales.nbytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    print(f"| weight | way | bytes | {' | '.join(f'{m} tokens' for m in TOKENS)} |\n| --- | --- | --- {'| --- ' * 3}|")
    for n, k in SHAPES:
        sessions = ways(n, k)
        took: dict[tuple[str, int], list[float]] = {}
        for m in TOKENS:
            feeds = {"x": np.random.default_rng(1).standard_normal((m, k), np.float32), "never": np.zeros(1, np.int64)}
            for turn in range(given.turns + 1):
                for way, (session, _) in sessions.items():
                    names = {value.name for value in session.get_inputs()}
                    began = time.process_time()
                    session.run(None, {name: value for name, value in feeds.items() if name in names})
                    took.setdefault((way, m), []).extend([time.process_time() - began] if turn else [])
        for way, (_, size) in sessions.items():
            row = " | ".join(f"{1e6 * statistics.median(took[way, m]):,.0f}" for m in TOKENS)
            print(f"| {n} x {k} | {way} | {size:,} | {row} |", flush=True)


if __name__ == "__main__":
    main()
