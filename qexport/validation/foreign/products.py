"""The products with a constant weight in a file, in every form that tools write them: what each reads and makes, and
what its weight is in float.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from ...artifact.manifest import FLOAT
from ...quant.formats.codebooks import decode_codebook
from ...quant.packing import unpack_high_first, unpack_rows
from .constants import BITS, CODES, FileGraph, attribute, filled
from .fusing import why_float

_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_BOOKS = ("fp4", "nf4")  # of MatMulBnb4, by its quant_type
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Weight:
    """A weight as it is in the file.

    Attributes:
        shape: [N, K] of the linear, whichever way the file has it.
        read: makes it float32 [N, K]; step: makes the distance of two codes, [N, K]; None for floats and tables.
        bits: of a code; block: input features to a scale, 0 for all of them; zero_points: whether it has them.
        bytes: of its codes, scales and zero points.
        names: of its tensors.
        trouble: why a DequantizeLinear in front of the product cannot become part of it; empty where nothing is known.
    """

    shape: tuple[int, int]
    read: Callable[[], Tensor]
    bits: int
    step: Callable[[], Tensor] | None = None
    block: int = 0
    zero_points: bool = False
    bytes: int = 0
    names: tuple[str, ...] = ()
    trouble: str = ""


@dataclass(frozen=True)
class Product:
    """One product with a constant weight.

    Attributes:
        node: its node; order: where in the file.
        input: the value that it reads, before that is rounded; output: what it makes, scales and bias applied.
        activations: how its input is rounded: "", "static" or "dynamic".
        accuracy: accuracy_level of a MatMulNBits, None where the attribute is not there.
        hints: names in which the path of a module may be.
    """

    node: NodeProto
    order: int
    input: str
    output: str
    weight: Weight
    activations: str = ""
    accuracy: int | None = None
    hints: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> bool:
        """Whether its weight is codes."""
        return self.weight.bits < 16

    @property
    def scheme(self) -> str:
        """Its format in the way recipes write them; "float" for one of floats."""
        if not self.quantized:
            return FLOAT
        kinds = {"": "a16", "static": "a8_static", "dynamic": "a8_dyn"}
        if self.node.op_type == "MatMulBnb4":
            return f"{_BOOKS[attribute(self.node, 'quant_type', 0)]}_g{self.weight.block}"
        group = f"_g{self.weight.block}" if self.weight.block else ""
        return f"w{self.weight.bits}{kinds[self.activations]}{group}{'_asym' if self.weight.zero_points else ''}"


Reader = Callable[[FileGraph, NodeProto], Product | None]


def products(graph: FileGraph, more: Mapping[str, Reader]) -> list[Product]:
    """All of them, in order; more: readers of further operators, by type."""
    readers, found = {**_READERS, **more}, []
    for node in graph.model.graph.node:
        read = readers.get(node.op_type)
        if read is not None and (made := read(graph, node)) is not None:
            found.append(made)
    return found


def made_by(graph: FileGraph, node: NodeProto, weight: Weight, accuracy: int | None = None) -> Product:
    """The product of a node, with what its input is before it is rounded, and its result with scales and bias."""
    value, rounded = _before_rounding(graph, node.input[0])
    made, scaled = node.output[0], _scaled_around(graph, value, node.output[0])
    if scaled is not None:
        (value, made), rounded = scaled, "dynamic"
    output = _with_bias(graph, node, made, weight.shape[0])
    if weight.bits < 16 and (node.op_type == "Conv" or (node.op_type == "Gemm" and rounded)):
        weight = replace(weight, trouble=why_float(graph, node, rounded))
    hints = (node.name, *weight.names, *node.output, output)
    return Product(node, graph.order[node.name], value, output, weight, rounded, accuracy, hints)


def _before_rounding(graph: FileGraph, value: str) -> tuple[str, str]:
    kind, rounded = "", value
    while (node := graph.makers.get(value)) is not None and node.op_type in _ROUNDING:
        source = graph.makers.get(node.input[0])
        if node.op_type == "DequantizeLinear" and (source is None or source.op_type not in _ROUNDING):
            return value, kind or "static"  # of codes that another operator on codes made
        if node.op_type != "DequantizeLinear":
            kind = "dynamic" if node.op_type[0] == "D" or not graph.constant(node.input[1]) else "static"
            if kind == "static" and _holds_activation(graph, node):
                return rounded, kind
        rounded, value = value, node.input[0]
    return value, kind


def _holds_activation(graph: FileGraph, node: NodeProto) -> bool:
    """Whether a QuantizeLinear cuts off what is below 0 of a product: the ReLU that a quantizer left out for it."""
    made = graph.makers.get(node.input[0])
    if made is None or made.op_type not in ("Conv", "Gemm", "MatMul", "Add") or len(node.input) < 3:
        return False
    zero = graph.array(node.input[2])
    return bool((zero == np.iinfo(zero.dtype).min).all()) if np.issubdtype(zero.dtype, np.integer) else False


def _scaled_around(graph: FileGraph, value: str, made: str) -> tuple[str, str] | None:
    """What is read and made where a product is of x / s and multiplied by s behind, a scale for each token."""
    divided, readers = graph.makers.get(value), graph.readers.get(made, [])
    if divided is None or divided.op_type not in ("Div", "Mul") or len(readers) != 1:
        return None
    if graph.constant(divided.input[1]):
        return None
    multiplied, scale = readers[0], divided.input[1]
    if divided.op_type == "Mul":  # by 1 / s
        inverse = graph.makers.get(scale)
        if inverse is None or inverse.op_type not in ("Reciprocal", "Div"):
            return None
        scale = inverse.input[-1]
    if multiplied.op_type != "Mul" or scale not in multiplied.input:
        return None
    return divided.input[0], multiplied.output[0]


def _with_bias(graph: FileGraph, node: NodeProto, value: str, rows: int) -> str:
    """The value behind scales, casts and the bias of a product that makes `value`, and behind rounding where the bias
    is added there, or codes come out: rounding may hold an activation, as its range does."""
    integer, codes = node.op_type in ("MatMulInteger", "ConvInteger"), node.op_type in ("QLinearMatMul", "QGemm")
    found = value
    for _ in range(6):
        readers = graph.readers.get(value, [])
        if len(readers) != 1:
            break
        reader = readers[0]
        other = next((name for name in reader.input if name != value), "")
        if reader.op_type == "Add" and graph.constant(other) and graph.sources(other):
            longest = graph.sources(other)[0]
            return reader.output[0] if int(np.prod(longest.dims, dtype=np.int64)) == rows else found
        scales = integer and (reader.op_type == "Cast" or (reader.op_type == "Mul" and _is_scale(graph, other)))
        if not scales and reader.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            break
        value = reader.output[0]
        if scales or codes:
            found = value
    return found


def _is_scale(graph: FileGraph, value: str) -> bool:
    """Whether a value is a scale: a constant, that of a DynamicQuantizeLinear, or a product of such."""
    node = graph.makers.get(value)
    if graph.constant(value) or node is None:
        return graph.constant(value)
    if node.op_type == "Mul":
        return all(_is_scale(graph, name) for name in node.input)
    return node.op_type == "DynamicQuantizeLinear" and value == node.output[1]


def constant_weight(graph: FileGraph, value: str, transposed: bool, alpha: float = 1.0) -> Weight | None:
    """A weight that is computed from constants alone.

    Args:
        transposed: the file has it as [N, K], or as the filters of a convolution.
    """
    sources = graph.sources(value)
    if not graph.constant(value) or not sources:
        return None
    longest = sources[0]
    if longest.data_type not in BITS or (longest.data_type not in CODES and longest.data_type not in _FLOAT_TYPES):
        return None
    dims = _dims(graph, value)
    if len(dims) < 2 or (len(dims) > 2 and not transposed):
        return None
    rows, columns = int(dims[0]), int(np.prod(dims[1:], dtype=np.int64))
    shape = (rows, columns) if transposed else (columns, rows)
    turn = (lambda found: found.flatten(1)) if transposed else (lambda found: found.t())
    names = tuple(tensor.name for tensor in sources)
    size = graph.bytes([value])
    if longest.data_type not in CODES:
        return Weight(
            shape, lambda: alpha * turn(graph.evaluate(value)), BITS[longest.data_type], bytes=size, names=names
        )
    codes = {tensor.name for tensor in sources if tensor.data_type in CODES}
    ones = {tensor.name: filled(tensor, int(tensor.name == longest.name)) for tensor in sources if tensor.name in codes}
    dequantize = next((n for n in graph.behind(value) if n.op_type == "DequantizeLinear"), None)
    return Weight(
        shape, lambda: alpha * turn(graph.evaluate(value)), BITS[longest.data_type],
        step=lambda: alpha * turn(graph.evaluate(value, ones)), block=_block(dequantize, sources, shape),
        zero_points=len(codes) > 1, bytes=size, names=names, trouble=_trouble(graph, value, dequantize, transposed),
    )  # fmt: skip


def _dims(graph: FileGraph, value: str) -> tuple[int, ...]:
    """The shape of a constant; of a computed one it is computed."""
    tensor = graph.tensors.get(value)
    dims = tuple(tensor.dims) if tensor is not None else None
    node = graph.makers.get(value)
    if dims is None and node is not None and node.op_type in ("DequantizeLinear", "Cast", "Identity"):
        return _dims(graph, node.input[0])
    return tuple(graph.evaluate(value).shape) if dims is None else dims


def _block(dequantize: NodeProto | None, sources: list[TensorProto], shape: tuple[int, int]) -> int:
    if dequantize is not None:
        return int(attribute(dequantize, "block_size", 0))
    scales = [t for t in sources if t.data_type in _FLOAT_TYPES]
    count = max((int(np.prod(t.dims, dtype=np.int64)) for t in scales), default=0)
    groups = count // shape[0] if count and count % shape[0] == 0 else 0
    return shape[1] // groups if groups > 1 and shape[1] % groups == 0 else 0


def _trouble(graph: FileGraph, value: str, dequantize: NodeProto | None, transposed: bool) -> str:
    """What ONNX Runtime asks of a DequantizeLinear that it makes part of a product, and does not find."""
    if dequantize is None:
        return "its codes become float by other operators than DequantizeLinear"
    if graph.makers.get(value) is not dequantize:
        return f"a {graph.makers[value].op_type} stands between its DequantizeLinear and the product"
    if len(graph.readers[value]) > 1:
        return f"{len(graph.readers[value])} products read its DequantizeLinear"
    if transposed:
        return "it is a Gemm whose weight is [N, K]"
    block = int(attribute(dequantize, "block_size", 0))
    if block & (block - 1) or (block and block < 16):
        return f"its blocks of {block} are not a power of two of at least 16"
    if block and attribute(dequantize, "axis", 1) != 0:
        return "its blocks are not along the input features"
    if any(name not in graph.tensors for name in dequantize.input if name):
        return "its scales or codes are computed"
    if len(dequantize.input) > 2 and not dequantize.input[2]:
        return "its zero point is an input that is empty, not absent"
    return ""


def _matmul(graph: FileGraph, node: NodeProto) -> Product | None:
    transposed = bool(attribute(node, "transB", 0))
    if attribute(node, "transA", 0) or graph.constant(node.input[0]):
        return None
    weight = constant_weight(graph, node.input[1], transposed, attribute(node, "alpha", 1.0))
    return None if weight is None else made_by(graph, node, weight)


def _n_bits(graph: FileGraph, node: NodeProto) -> Product | None:
    n, k = attribute(node, "N"), attribute(node, "K")
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size")
    given = [*node.input, *[""] * (6 - len(node.input))]
    if not all(graph.constant(name) for name in given[1:5] if name):
        return None

    def scales() -> Tensor:
        found = torch.from_numpy(graph.array(given[2]).astype(np.float32)).reshape(n, -1)
        if given[4]:
            return found[:, torch.from_numpy(graph.array(given[4]).astype(np.int64))[:k]]
        return found.repeat_interleave(block, 1)[:, :k]

    def read() -> Tensor:
        codes = unpack_rows(torch.from_numpy(graph.array(given[1]).reshape(n, -1).copy()), bits, k).float()
        return (codes - _zero_points(graph, given[3], given[4], (n, k), bits, block)) * scales()

    names = tuple(filter(None, given[1:4]))
    weight = Weight((n, k), read, bits, scales, block, bool(given[3]), graph.bytes(given[1:5]), names)
    return made_by(graph, node, weight, accuracy=attribute(node, "accuracy_level"))


def _zero_points(
    graph: FileGraph, name: str, order: str, shape: tuple[int, int], bits: int, block: int
) -> Tensor | float:
    """Of a MatMulNBits for every weight, [N, K]; one number where the middle of the codes is meant."""
    if not name:
        return float(2 ** (bits - 1))
    (n, k), found = shape, graph.array(name)
    if found.dtype == np.uint8:
        points = unpack_rows(torch.from_numpy(found.reshape(n, -1).copy()), bits, -(-k // block)).float()
    else:
        points = torch.from_numpy(found.astype(np.float32)).reshape(n, -1)
    if order:
        return points[:, torch.from_numpy(graph.array(order).astype(np.int64))[:k]]
    return points.repeat_interleave(block, 1)[:, :k]


def _bnb4(graph: FileGraph, node: NodeProto) -> Product | None:
    n, k, block = attribute(node, "N"), attribute(node, "K"), attribute(node, "block_size")
    if not all(graph.constant(name) for name in node.input[1:3]):
        return None

    def read() -> Tensor:
        packed = torch.from_numpy(graph.array(node.input[1]).reshape(-1))
        codes = unpack_high_first(packed, n * k).reshape(1, -1)
        scale = torch.from_numpy(graph.array(node.input[2]).astype(np.float32)).reshape(1, -1)
        padded = torch.nn.functional.pad(codes, (0, scale.numel() * block - n * k))
        book = _BOOKS[attribute(node, "quant_type", 0)]
        return decode_codebook(padded, scale, book, block)[0, : n * k].reshape(n, k)

    return made_by(graph, node, Weight((n, k), read, 4, None, block, False, graph.bytes(list(node.input[1:3])),
                                     tuple(node.input[1:3])))  # fmt: skip


def _integer_form(scale_at: int, zero_at: int) -> Callable[[FileGraph, NodeProto], Product | None]:
    """The reader of an operator on [K, N] codes.

    Args:
        scale_at, zero_at: inputs with the weight's scale and zero point; scale_at -1: it is multiplied behind.
    """

    def reader(graph: FileGraph, node: NodeProto) -> Product | None:
        weight_at = {"DynamicQuantizeMatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1}.get(node.op_type, 3)
        codes = node.input[weight_at]
        tensor = graph.tensors.get(codes)
        scale = node.input[scale_at] if scale_at >= 0 else scale_behind(graph, node.output[0])
        if tensor is None or len(tensor.dims) != 2 or not scale or not graph.constant(scale):
            return None
        zero = node.input[zero_at] if len(node.input) > zero_at else ""
        k, n = tensor.dims
        turned = node.op_type == "QGemm" and attribute(node, "transB", 0)
        if turned:
            n, k = tensor.dims

        def steps() -> Tensor:
            return torch.from_numpy(graph.array(scale).astype(np.float32)).reshape(-1, 1).expand(n, k)

        def read() -> Tensor:
            found = torch.from_numpy(graph.array(codes).astype(np.float32))
            points = torch.from_numpy(graph.array(zero).astype(np.float32)).reshape(-1, 1) if zero else 0.0
            return ((found if turned else found.t()) - points) * steps()

        weight = Weight((n, k), read, 8, steps, 0, bool(zero), graph.bytes([codes, scale, zero]), (codes, scale))
        made = made_by(graph, node, weight)
        rounded = "dynamic" if node.op_type == "DynamicQuantizeMatMul" else made.activations or "static"
        return replace(made, activations=rounded)

    return reader


def scale_behind(graph: FileGraph, value: str) -> str:
    """The constant among the factors that a product of integers is multiplied by."""
    for _ in range(3):
        readers = graph.readers.get(value, [])
        if len(readers) != 1 or readers[0].op_type not in ("Cast", "Mul"):
            return ""
        others = [name for name in readers[0].input if name != value]
        for other in others:
            maker = graph.makers.get(other)
            factors = [other, *(maker.input if maker is not None and maker.op_type == "Mul" else ())]
            if found := next((name for name in factors if graph.constant(name)), ""):
                return found
        value = readers[0].output[0]
    return ""


_READERS: dict[str, Reader] = {
    "MatMul": _matmul, "Gemm": _matmul, "FusedMatMul": _matmul, "MatMulNBits": _n_bits, "MatMulBnb4": _bnb4,
    "MatMulInteger": _integer_form(-1, 3), "MatMulIntegerToFloat": _integer_form(3, 5),
    "DynamicQuantizeMatMul": _integer_form(2, 3), "QLinearMatMul": _integer_form(4, 5), "QGemm": _integer_form(4, 5),
}  # fmt: skip
