"""What is slow or set by nobody in a file, in sentences."""

from collections import Counter
from collections.abc import Sequence

from ...artifact.manifest import CPU
from ...runtime.session import OptimizedGraph, node_of
from ..report import Unfused
from .products import Product

FUSED = {  # operators that a product with codes may become, by how the file has it
    "MatMulNBits": ("MatMulNBits",), "MatMulBnb4": ("MatMulBnb4",), "QLinearMatMul": ("QLinearMatMul",),
    "QGemm": ("QGemm",), "MatMulIntegerToFloat": ("MatMulIntegerToFloat",),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul",),
    "MatMulInteger": ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    "ConvInteger": ("ConvInteger",),
}  # fmt: skip
_ROUNDED = ("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "MatMulNBits")
_WEIGHT_ONLY = ("MatMulNBits",)
_FLOAT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv")
_LEVEL = "session.qdq_matmulnbits_accuracy_level"


def kernel(product: Product, graph: OptimizedGraph) -> tuple[str, str | None]:
    """(the operator that a product should be, the one that it is)."""
    found = node_of(graph.nodes, product.output, product.node.name)
    there = found.op_type if found else None
    fine: tuple[str, ...]
    if not product.quantized:
        fine = _FLOAT
    elif product.node.op_type == "Conv":
        fine = ("QLinearConv",)
    elif product.node.op_type in FUSED:
        fine = FUSED[product.node.op_type]
    else:
        fine = _ROUNDED if product.activations else _WEIGHT_ONLY
    return there if there in fine else fine[0], there


def why_unfused(products: Sequence[tuple[str, Product]], unfused: Sequence[Unfused]) -> list[str]:
    """Sentences on why products with codes are float products at every run, by reason."""
    there = {found.name for found in unfused}
    reasons: dict[str, list[str]] = {}
    for name, product in products:
        if name in there:
            reason = product.weight.trouble
            if not reason and product.activations and product.weight.bits < 8:
                reason = f"no kernel takes {product.weight.bits}-bit weights with rounded inputs in this form"
            if not reason and product.weight.bits == 8 and not product.activations and product.weight.block == 0:
                reason = "nothing rounds its input, and ONNX Runtime leaves it so"
            reasons.setdefault(reason or "ONNX Runtime does not say why", []).append(name)
    return [f"{_some(names)} not fused, so that its codes become float again at every run: {why}"
            for why, names in reasons.items()]  # fmt: skip


def speed(
    products: Sequence[tuple[str, Product]], graph: OptimizedGraph, session: dict[str, str], provider: str, dtype: str
) -> list[str]:
    """Sentences on slow kernels, settings that nobody made, and copies."""
    said = []
    direct = [(name, p) for name, p in products if p.node.op_type == "MatMulNBits"]
    if graph.op_counts()["GatherBlockQuantized"]:
        said.append("its embedding is a table of codes (GatherBlockQuantized), whose cost shows after the first block")
    if unset := [name for name, p in direct if not p.accuracy and p.weight.bits <= 8]:
        said.append(
            f"accuracy_level is not set for {_some(unset)}: their inputs stay float, which is the slow way on a CPU (4 "
            "rounds them to 8 bits)"
        )
    levels = Counter(p.accuracy for _, p in direct if p.accuracy)
    if rounded := levels.get(4):
        said.append(f"{rounded} linears have accuracy_level 4: the CPU rounds their inputs to 8 bits by block")
    fused = [name for name, p in products if p.node.op_type == "MatMul" and p.quantized and not p.activations]
    if fused and _LEVEL not in session:
        said.append(
            f"{_some(fused)} become MatMulNBits when the file is loaded, and nobody sets {_LEVEL}: by default the CPU "
            "rounds their inputs to 8 bits"
        )
    if provider == CPU:
        said += _of_the_cpu(products, dtype)
    copies = sum(count for op, count in graph.op_counts().items() if op.startswith("Memcpy"))
    if copies:
        said.append(f"{copies} values are copied between the host and the device at every run")
    return said


def _of_the_cpu(products: Sequence[tuple[str, Product]], dtype: str) -> list[str]:
    said = []
    if slow := [n for n, p in products if p.weight.bits == 2 and p.weight.zero_points]:
        said.append(f"{_some(slow)}: 2 bits with zero points have no fast kernel on the CPU")
    direct = [(n, p) for n, p in products if p.node.op_type == "MatMulNBits" and p.accuracy != 4]
    if slow := [n for n, p in direct if p.weight.bits in (2, 8)]:
        said.append(f"{_some(slow)}: 2 and 8 bits have a fast kernel at accuracy_level 4 only on the CPU")
    if slow := [n for n, p in products if p.node.op_type == "MatMulBnb4"]:
        said.append(f"{_some(slow)}: MatMulBnb4 makes floats of its codes at every run on the CPU")
    if slow := [n for n, p in products if p.node.op_type == "MatMulInteger" and not p.activations]:
        said.append(f"{_some(slow)}: MatMulInteger whose input no DynamicQuantizeLinear rounds is slow on most CPUs")
    if dtype != "float32":
        said.append(f"its values are {dtype}, for which the CPU has few kernels: it computes in float32 between casts")
    return said


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
