"""Which number formats ONNX Runtime has kernels for, found out by running: schemas, kernels, what sessions accept.

    python samples/number_formats.py [--out samples/results/number_formats.md]

The CPU's sessions run and are compared with what the numbers mean. CUDA's are placed on stand-ins for its libraries,
with which a session opens, chooses kernels and checks shapes, but nothing is computed; so this needs a checkout of the
project, Linux on x86-64 and gcc. About a minute.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.cuda_placement.build import CannotBuild, build_stand_ins, build_tensorrt_stand_ins  # noqa: E402
from helpers.cuda_placement.models import ALL_ON_CUDA, model, value  # noqa: E402
from helpers.cuda_placement.probe import PlacementError, placement  # noqa: E402

OPERATORS = (
    "MatMulNBits", "MatMulBnb4", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "GemmFloat8", "QMoE",
    "GroupQueryAttention", "GatherBlockQuantized", "DequantizeLinear", "QuantizeLinear", "Cast",
)  # fmt: skip
F32, F16, BF16, U8 = (getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "UINT8"))
E4M3, E5M2, E8M0 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E8M0
BITS = {F32: 32, F16: 16, BF16: 16, U8: 8, E4M3: 8, E5M2: 8, E8M0: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4,
        TensorProto.FLOAT4E2M1: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}  # fmt: skip
MICROSOFT = "com.microsoft"
Row = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results" / "number_formats.md"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        args.out.write_text("\n".join(lines(Path(place))) + "\n", "utf-8")


def lines(place: Path) -> Iterator[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnxruntime-gpu", "ml_dtypes"))
    yield from (
        "# Number formats in ONNX Runtime", "", "Made by `python samples/number_formats.py`. " + packages + ".", "",
        "CUDA is asked by placement on stand-ins for its libraries: sessions open, choose kernels and check shapes "
        "there, and compute nothing.", "", "## Kernels", "",
        "Types that kernels of the newest version of an operator are registered for, not all of them together; of Cast "
        "those of 8 bits and less.", "", "| operator | since | provider | types |", "| --- | --- | --- | --- |",
    )  # fmt: skip
    try:
        env = build_tensorrt_stand_ins(build_stand_ins(place), place)
    except CannotBuild as why:
        env = None
        yield f"| none | | | {why} |"
    else:
        yield from kernels(env)
    yield from ("", "## The CPU, computed", "", "| what | what it gives |", "| --- | --- |")
    yield from (f"| {what} | {found} |" for what, found in (*on_the_cpu(), *products_on_the_cpu()))
    if env is not None:
        yield from ("", "## CUDA, placed", "", "| what | accepted |", "| --- | --- |")
        yield from (f"| {what} | {found} |" for what, found in on_cuda(place, env))


# ---- the registry


def kernels(env: dict[str, str]) -> Iterator[str]:
    """In a process of its own: libraries are found when it starts."""
    done = subprocess.run([sys.executable, "-c", _REGISTRY], env=env, capture_output=True, text=True, check=True)
    found = [row for row in json.loads(done.stdout.splitlines()[-1]) if row[0] in OPERATORS]
    newest: dict[tuple[str, str, str], int] = {}
    for operator, domain, since, provider, _ in found:
        newest[operator, domain, provider] = max(since, newest.get((operator, domain, provider), 0))
    for operator, domain, provider in sorted(newest, key=lambda key: (OPERATORS.index(key[0]), key)):
        if provider not in ("CPU", "CUDA"):
            continue
        types: dict[str, list[str]] = {}
        for *key, since, there, listed in found:
            if (*key, there) == (operator, domain, provider) and since == newest[operator, domain, provider]:
                for name, those in listed.items():
                    types.setdefault(name, []).extend(re.findall(r"tensor\((\w+)\)", " ".join(those)))
        told = [f"{name} {_listed(operator, those)}" for name, those in sorted(types.items()) if name != "Tind"]
        since = newest[operator, domain, provider]
        yield f"| {operator} ({domain or 'ai.onnx'}) | {since} | {provider} | {'; '.join(told)} |"


def _listed(operator: str, names: list[str]) -> str:
    known = dict.fromkeys(names)
    return "/".join(n for n in known if operator != "Cast" or re.search("float8|float4|int2|int4", n))


_REGISTRY = """
import json
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
print(json.dumps([
    (k.op_name, k.domain, k.version_range[0], k.provider.replace("ExecutionProvider", ""), dict(k.type_constraints))
    for k in get_all_opkernel_def()
]))
"""


# ---- the CPU


def session(
    nodes: list[NodeProto], inputs: list, outputs: list, tensors: list, opset: int = 23
) -> ort.InferenceSession:
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    built = helper.make_model(graph, opset_imports=opsets, ir_version=13)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(built.SerializeToString(), options, providers=["CPUExecutionProvider"])


def tensor(name: str, dtype: int, shape: tuple[int, ...], content: bytes | None = None) -> TensorProto:
    """Of the given bytes, or of zeros."""
    size = -(-int(np.prod(shape)) * BITS[dtype] // 8)
    return TensorProto(name=name, data_type=dtype, dims=shape, raw_data=content or bytes(size))


def floats(name: str, array: np.ndarray) -> TensorProto:
    return tensor(name, F32, np.shape(array), np.asarray(array, np.float32).tobytes())


def tried(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:  # ONNX Runtime has kinds of its own for each
        return f"no: {error}"


FLOATS = {
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn, "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E8M0": ml_dtypes.float8_e8m0fnu, "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip


def on_the_cpu() -> Iterator[Row]:
    every = np.arange(256, dtype=np.uint8)
    for name in (*FLOATS, "INT4", "UINT4", "INT2", "UINT2"):
        dtype = getattr(TensorProto, name)
        bits = BITS[dtype]
        codes = every[:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1  # the first in the low bits
        codes = codes.astype(np.uint8)
        if name.startswith("INT"):
            codes = (codes << 8 - bits).view(np.int8) >> 8 - bits
        values = (codes.view(FLOATS[name]) if name in FLOATS else codes).astype(np.float32).reshape(-1)
        for operator in ("Cast", "DequantizeLinear"):
            told = {opset: _all_codes(operator, dtype, values, opset) for opset in (21, 23, 24, 25)}
            right = [str(opset) for opset, found in told.items() if found == "right"]
            wrong = ", ".join(f"otherwise in opset {opset}" for opset, found in told.items() if found == "otherwise")
            here = f"as ml_dtypes, the first in the low bits, in opsets {', '.join(right)}" if right else "no kernel"
            yield f"{operator} of all bytes as {name}", wrong or here
    for name, limit in (("FLOAT8E4M3FN", 448), ("FLOAT8E5M2", 57344)):
        for saturate in (1, 0):
            yield f"Cast of all bfloat16 numbers to {name}, saturate={saturate}", _rounded(name, limit, saturate)


def _all_codes(operator: str, dtype: int, wanted: np.ndarray, opset: int) -> str:
    node = helper.make_node(operator, ["x"] if operator == "Cast" else ["x", "s"], ["y"])
    if operator == "Cast":
        node.attribute.append(helper.make_attribute("to", F32))
    tensors = [tensor("x", dtype, wanted.shape, bytes(range(256))), floats("s", np.float32(1))]
    output = helper.make_tensor_value_info("y", F32, wanted.shape)

    def run() -> str:
        got = session([node], [], [output], tensors if operator != "Cast" else tensors[:1], opset).run(None, {})[0]
        return "right" if np.array_equal(got, wanted, equal_nan=True) else "otherwise"

    return tried(run)


def _rounded(name: str, limit: float, saturate: int) -> str:
    numbers = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    kind = FLOATS[name]
    with np.errstate(all="ignore"):
        wanted = (np.clip(numbers, -limit, limit) if saturate else numbers).astype(kind).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=getattr(TensorProto, name), saturate=saturate),
        helper.make_node("Cast", ["c"], ["y"], to=F32),
    ]
    ends = [helper.make_tensor_value_info(n, F32, numbers.shape) for n in "xy"]
    got = session(nodes, ends[:1], ends[1:], []).run(None, {"x": numbers})[0]
    off = ~((got == wanted) | np.isnan(got) & np.isnan(wanted))
    if not off.any():
        return "to nearest, ties to even, as ml_dtypes"
    some = ", ".join(f"{numbers[i]:g} to {got[i]:g} and not {wanted[i]:g}" for i in np.flatnonzero(off)[[0, -1]])
    return f"{int(off.sum())} of 65536 otherwise: {some}"


def products_on_the_cpu() -> Iterator[Row]:
    """MatMulNBits against a product in float64 of small integers, with which only inputs rounded to 8 bits differ."""
    for bits in (2, 3, 4, 5, 8):
        told = []
        for block in (8, 16, 32, 64, 128, 256, 512):
            found = [tried(lambda b=block, level=level, bits=bits: _nbits(bits, b, level)) for level in (1, 4)]
            told.append(f"{block} {'no' if found[0].startswith('no') else ', '.join(found)}")
        yield f"MatMulNBits, {bits} bits, by block size: inputs at accuracy level 1, and 4", "; ".join(told)


def _nbits(bits: int, block: int, level: int) -> str:
    k, n, rng = 512, 16, np.random.default_rng(0)
    codes, x = rng.integers(0, 1 << bits, (n, k)), rng.normal(size=(3, k)).astype(np.float32)
    packed = np.packbits((codes[..., None] >> np.arange(bits) & 1).reshape(n, -1).astype(np.uint8), -1, "little")
    scale = rng.random((n, k // block), dtype=np.float32) + 0.5
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain=MICROSOFT, K=k, N=n, bits=bits, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    shape = (n, k // block, block * bits // 8)
    tensors = [tensor("b", U8, shape, packed.tobytes()), floats("s", scale)]
    ends = [helper.make_tensor_value_info(name, F32, (3, size)) for name, size in (("x", k), ("y", n))]
    got = session([node], ends[:1], ends[1:], tensors).run(None, {"x": x})[0]
    wanted = x @ ((codes - (1 << bits - 1)) * scale.repeat(block, 1)).T
    return "float" if np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max() else "rounded"


# ---- CUDA


def on_cuda(place: Path, env: dict[str, str]) -> Iterator[Row]:
    def placed(nodes: list[NodeProto], inputs: list, outputs: list, tensors: list) -> str:
        path = place / "model.onnx"
        try:
            onnx.save(model(nodes, inputs, outputs, tensors), path)
            found = placement(path, ALL_ON_CUDA, env, {"n": 3, "past": 5, "total": 8})
        except (PlacementError, onnx.checker.ValidationError) as error:
            said = str(error).strip().splitlines()[-1]
            return "no: " + re.sub(r".*(was false\.|Status Message:|Type Error:)", "", said).strip()[:120]
        return "yes" if set(found["nodes"]) == {"CUDAExecutionProvider"} else f"no: {found['nodes']}"

    def each(what: str, cases: dict[object, tuple]) -> Row:
        """What is accepted, and why others are not."""
        found = {case: placed(*arguments) for case, arguments in cases.items()}
        refused = {why: [str(c) for c, w in found.items() if w == why] for why in found.values() if why != "yes"}
        good = [str(case) for case, why in found.items() if why == "yes"]
        return what, "; ".join([", ".join(good), *(f"{', '.join(c)} {why}" for why, c in refused.items())]).strip("; ")

    for operator, bits, sizes in (
        ("MatMulBlockQuantizedFp4Weight", 4, (16, 32, 64, 128)),
        ("MatMulBlockQuantizedFp8Weight", 8, (16, 32, 96, 128, 1024)),
    ):
        for dtype, name in ((F16, "float16"), (BF16, "bfloat16"), (F32, "float32")):
            cases = {size: _product(operator, bits, size, dtype, 96) for size in sizes}
            yield each(f"{operator}, {name}, 96 inputs, block sizes", cases)
    yield (
        "MatMulBlockQuantizedFp8Weight with a scale of its inputs (W8A8)",
        placed(*_product("MatMulBlockQuantizedFp8Weight", 8, 128, F16, 129, input_scale=True)),
    )
    for bits in (2, 3, 4, 8):
        cases = {size: _nbits_on_cuda(bits, size) for size in (16, 32, 64, 128, 256)}
        yield each(f"MatMulNBits, {bits} bits, float16, block sizes", cases)
    for kind, scale, block in (("fp4", E8M0, 32), ("nvfp4", E4M3, 16), ("wfp4afp8", E8M0, 32), ("fp8", F32, 128)):
        sizes = ((128, 128), (64, 96), (96, 160)) if kind != "fp8" else ((128, 128),)
        cases = {f"{a} and {b}": _experts(kind, a, b, scale, block) for a, b in sizes}
        yield each(f"QMoE, quant_type {kind}, float16, hidden and inner size", cases)
    for name, dtype in (("float16", F16), ("bfloat16", BF16)):
        for kind in ("PER_TENSOR", "PER_CHANNEL"):
            cases = {size: _attention(dtype, size, kind) for size in (16, 64, 128, 256)}
            yield each(f"GroupQueryAttention, {name}, a cache of FLOAT8E4M3FN, {kind}, head sizes", cases)


def _product(operator: str, bits: int, block: int, dtype: int, k: int, input_scale: bool = False) -> tuple:
    n, groups = 64, -(-k // block)
    weight, scale = (U8, U8) if bits == 4 else (E4M3, F32)
    tensors = [tensor("w", weight, (n, k * bits // 8)), tensor("s", scale, (n, groups))]
    tensors += [tensor("one", F32, ())] if bits == 4 or input_scale else []
    node = helper.make_node(operator, ["x", *(t.name for t in tensors)], ["y"], domain=MICROSOFT, block_size=block)
    return [node], [value("x", dtype, "n", k)], [value("y", dtype, "n", n)], tensors


def _nbits_on_cuda(bits: int, block: int) -> tuple:
    k, n = 256, 64
    tensors = [tensor("w", U8, (n, k // block, block * bits // 8)), tensor("s", F16, (n, k // block))]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=k, N=n, bits=bits, block_size=block
    )
    return [node], [value("x", F16, "n", k)], [value("y", F16, "n", n)], tensors


def _experts(kind: str, hidden: int, inner: int, scale: int, block: int, count: int = 4) -> tuple:
    packed, weight = (1, E4M3) if kind == "fp8" else (2, U8)
    up, down = ((2 * inner, hidden), (hidden, inner))
    tensors = [tensor(n, weight, (count, rows, columns // packed)) for n, (rows, columns) in (("w1", up), ("w2", down))]
    for name, (rows, columns) in (("s1", up), ("s2", down)):
        rows = -(-rows // block) if kind == "fp8" else rows
        tensors.append(tensor(name, scale, (count, rows, columns // block)))
    read = ["x", "r", "w1", "s1", "", "w2", "s2"]
    if kind != "fp8":
        tensors += [tensor(name, F32, (count,)) for name in ("g1", "g2")]
        read += [""] * 8 + ["g1", "g2"]
    node = helper.make_node(
        "QMoE", read, ["y"], domain=MICROSOFT, k=2, activation_type="swiglu", swiglu_fusion=1, quant_type=kind,
        expert_weight_bits=8 // packed, block_size=block,
    )  # fmt: skip
    ends = [value(name, F16, "n", size) for name, size in (("x", hidden), ("r", count), ("y", hidden))]
    return [node], ends[:2], ends[2:], tensors


def _attention(dtype: int, size: int, kind: str) -> tuple:
    heads, shape = 2, (1,) if kind == "PER_TENSOR" else (2, 1, size)
    lengths = [helper.make_tensor(name, TensorProto.INT32, [1], [n]) for name, n in (("last", 7), ("whole", 8))]
    tensors = [*lengths, *(tensor(name, F32, shape) for name in ("ks", "vs"))]
    read = ["q", "k", "v", "pk", "pv", "last", "whole", "", "", "", "", "", "ks", "vs"]
    node = helper.make_node(
        "GroupQueryAttention", read, ["y", "nk", "nv"], domain=MICROSOFT, num_heads=4, kv_num_heads=heads,
        k_quant_type=kind, v_quant_type=kind, kv_cache_bit_width=8,
    )  # fmt: skip
    inputs = [value(name, dtype, 1, 3, count * size) for name, count in (("q", 4), ("k", heads), ("v", heads))]
    inputs += [value(name, E4M3, 1, heads, "past", size) for name in ("pk", "pv")]
    outputs = [value("y", dtype, 1, 3, 4 * size), *(value(n, E4M3, 1, heads, "total", size) for n in ("nk", "nv"))]
    return [node], inputs, outputs, tensors


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
