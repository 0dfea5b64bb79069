"""Which products a further CUDA kernel of ONNX Runtime for MatMulNBits takes: fpA_intB, weights packed anew at load.

The session entry `ep.cuda.fpa_intb_gemm` puts it in front of the two other ways, a matrix-vector kernel for few rows,
and unpacking the whole weight at every call. Files leave it off: on an H200 it makes 4-bit weights slower, in prompts
and in steps, and 8-bit ones slower in prompts (samples/results/gpu.md).
Where it is on, it is chosen by shape alone, in bfloat16 as in float16, so that all of this is told without a GPU. What
lowering never makes is not asked for: biases inside the operator, and indices of groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from ...graph.views import DequantizeLinear, Matmul, MatMulNBits, sizes_of
from ...quant.formats import WeightFormat
from ...quant.packing import DEFAULT_BLOCK, stored_block

ENTRY = "ep.cuda.fpa_intb_gemm"

_BLOCK = {2: 64, 4: 32, 8: 32}
_COLUMNS = {2: 128, 4: 64, 8: 32}
# Rows of the weight that the matrix kernel takes at a time. The choice looks only at whole blocks.
_ROWS = 64


@dataclass(frozen=True)
class Product:
    """A MatMulNBits.

    Attributes:
        bits: of a code in the file; block_size: input features to a scale in the file.
        symmetric: whether it has no zero points.
        shape: (N, K), output and input features.
    """

    bits: int
    block_size: int
    symmetric: bool
    shape: tuple[int, int]


def planned(weight: WeightFormat, shape: tuple[int, int]) -> Product:
    """The MatMulNBits that a weight in a float product becomes."""
    bits, size = weight.stored_bits, weight.group_size
    return Product(bits, stored_block(bits, size) if size > 0 else DEFAULT_BLOCK, not weight.has_zero_points, shape)


def product_of(node: Node) -> Product | None:
    """The MatMulNBits that a rewritten product is, or will be when the file is loaded; None for other operators."""
    weight: MatMulNBits | DequantizeLinear
    if (kernel := MatMulNBits.match(node)) is not None:
        weight, block_size = kernel, kernel.block_size
    elif (product := Matmul.match(node)) is not None and (found := DequantizeLinear.match(product.weight)) is not None:
        weight, block_size = found, DEFAULT_BLOCK
    else:
        return None
    k, n = sizes_of(weight.codes)
    return Product(weight.bits, block_size, weight.zero_point is None, (n, k))


def why_not(product: Product) -> str:
    """Why a product runs as another kernel; empty where it runs as this one."""
    return _why_not_chosen(product) or _why_no_kernel(product)


def why_slow(products: Mapping[str, Product]) -> dict[str, str]:
    """`why_not` for all products of a file, by name: one that it is chosen for and fails on keeps it from all."""
    stuck = next((name for name, product in products.items() if has_no_kernel(product)), None)
    found = {name: why_not(product) for name, product in products.items()}
    off = f"cannot be turned on for this file, where {stuck} would fail"
    return found if stuck is None else {name: why or off for name, why in found.items()}


def has_no_kernel(product: Product) -> bool:
    """Whether a session with the entry chooses the kernel for a product, and then fails on prompts."""
    return not _why_not_chosen(product) and bool(_why_no_kernel(product))


def _why_not_chosen(product: Product) -> str:
    n, k = product.shape
    block, columns = _BLOCK[product.bits], _COLUMNS[product.bits]
    if not product.symmetric:
        return "has zero points"
    if product.block_size != block:
        return f"blocks of {product.block_size}, not {block}"
    if n % columns:
        return f"{n} output features, not a multiple of {columns}"
    return f"{k} input features, not a multiple of {block}" if k % block else ""


def _why_no_kernel(product: Product) -> str:
    k = product.shape[1]
    return f"{k} input features, not a multiple of {_ROWS}" if k % _ROWS else ""
