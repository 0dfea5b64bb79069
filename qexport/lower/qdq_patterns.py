"""Reading a quantized linear back from the canonical graph."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.edit import add_tensor, call, is_call
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.views import Cast, DequantizeLinear, Div, Matmul, Mul, Operand, operand
from ..passes.formats import form_at, form_at_kernel

aten = torch.ops.aten
ops = torch.ops.qexport
# What every provider has for products with weights of few bits.
WEIGHT_KERNELS = frozenset({"MatMulNBits", "MatMulBnb4"})


@dataclass(frozen=True)
class Rounding:
    """How what a product reads is rounded.

    Attributes:
        quantize, dequantize: the calls.
        token_scale: of a dynamic activation; None where it is static.
    """

    quantize: Node
    dequantize: Node
    token_scale: Node | None = None


@dataclass(frozen=True)
class ProductForm:
    """How one product of the canonical graph is quantized.

    Attributes:
        scales_in_sum: whether scales of the weight differ between input features.
        rounding: of the activation; None where it is float.
    """

    scales_in_sum: bool
    rounding: Rounding | None = None

    @property
    def integer(self) -> Rounding | None:
        """The rounding, where the product can run as one integer matmul: both sides 8 bits, scales outside the sum."""
        return None if self.scales_in_sum else self.rounding


def linear_products(graph: Graph) -> list[Node]:
    """The matmul of every quantized linear."""
    return [n for n in graph.nodes if Meta.LINEAR in n.meta]


def read_by(product: Node) -> Node:
    """What a product, canonical or rewritten, multiplies with its weight."""
    if (canonical := Matmul.match(product)) is not None:
        return canonical.x
    given = bind(product)
    read: Node = given.a if is_call(product, ops.matmul_integer.default) else given.x
    return read


def form_of(product: Node) -> ProductForm:
    """The form of a canonical product, or of one already rewritten for the CPU."""
    canonical = Matmul.of(product)
    in_sum = form_at(canonical.weight).scales_in_sum(canonical.weight)
    if (static := DequantizeLinear.match(canonical.x)) is not None:
        return ProductForm(in_sum, Rounding(static.codes, canonical.x, _token_scale_behind(product)))
    dynamic = Mul.match(canonical.x)
    if dynamic is not None and (codes := DequantizeLinear.match(dynamic.x)) is not None:
        step = dynamic.other if isinstance(dynamic.other, Node) else None
        return ProductForm(in_sum, Rounding(codes.codes, dynamic.x, step))
    return ProductForm(in_sum)


def _token_scale_behind(product: Node) -> Node | None:
    for user in product.users:
        scaled = Mul.match(user)
        if scaled is not None and isinstance(scaled.other, Node) and _is_step(scaled.other):
            return scaled.other
    return None


def input_of(product: Node) -> Node:
    """The float value that a product, canonical or rewritten, reads, before it is rounded, reordered or padded."""
    node = read_by(product)
    while (before := _unrounded(_uncast(node))) is not None:
        node = before
    return node


def _uncast(node: Node) -> Node:
    while (cast := Cast.match(node)) is not None:
        node = cast.x
    return node


def _unrounded(node: Node) -> Node | None:
    """What a step of rounding, reordering or padding a value reads; None of a node that is no such step."""
    rounds = is_call(node, ops.matmul_nbits_input.default, ops.quantize_linear.default, ops.round_e4m3.default)
    if rounds or node.meta.keys() & {Meta.REORDERED, Meta.PADDED}:
        return operand(node)
    if (dequantized := DequantizeLinear.match(node)) is not None:
        return dequantized.codes
    if (quotient := Div.match(node)) is not None and _is_step(quotient.other):
        return quotient.x
    if (product := Mul.match(node)) is None:
        return None
    if node.meta.get(Meta.WITHOUT_OUTLIERS) or is_call(product.x, ops.dequantize_linear.default):
        return product.x
    # A value held within the range of few bits, and CrossQuant's rounding on floats.
    if is_call(product.x, aten.clamp.default, aten.round.default):
        inside = Div.match(bind(product.x).self)
        return inside.x if inside is not None and inside.other is product.other else None
    return None


def _is_step(value: Operand) -> bool:
    """Whether a value is the step of a dynamic activation: a token's scale, or the larger of two."""
    if not isinstance(value, Node):
        return False
    node = _uncast(value)
    parts = bind(node) if is_call(node, aten.maximum.default) else None
    scales = (node,) if parts is None else (_uncast(parts.self), _uncast(parts.other))
    return all(is_call(scale, ops.token_scale.default) for scale in scales)


def as_own_kernel(module: GraphModule, product: Node, kernels: Collection[str] = WEIGHT_KERNELS) -> None:
    """matmul(x, dequantize(...)) becomes the one node that ONNX Runtime has for the two, where there is one.

    Of some weights it would make that node itself while it loads the file, which then takes twice as long, and by
    session entries that a caller may forget; of 2-bit codes and blocks above 256 it would not.

    Args:
        kernels: the ONNX operators that the target has for weights of few bits.
    """
    canonical = Matmul.of(product)
    found = form_at(canonical.weight).own_product(canonical.x, canonical.weight, kernels)
    if found is None:
        return
    operator, arguments = found
    with module.graph.inserting_before(product):
        node = call(module.graph, operator, arguments, like=product)
    node.meta = dict(product.meta)
    product.replace_all_uses_with(node)
    module.graph.erase_node(product)


def as_standard_operators(module: GraphModule, product: Node) -> None:
    """A product stays matmul(x, dequantize(...)), in the form that ONNX Runtime makes its kernel of when it loads it.

    It makes none of a weight that several products read, nor where the input comes straight from a DequantizeLinear, as
    that of a static activation does in front of weights in groups.
    """
    graph, canonical = module.graph, Matmul.of(product)
    if len(canonical.weight.users) > 1:
        with graph.inserting_before(product):
            own = graph.node_copy(canonical.weight)
        product.replace_input_with(canonical.weight, own)
    static = DequantizeLinear.match(canonical.x)
    if static is None or not form_of(product).scales_in_sum:
        return
    with graph.inserting_before(product):
        one = add_tensor(graph, f"{product.meta[Meta.LINEAR]}.input_unit", torch.ones(()))
        given = (static.codes, one, static.zero_point, static.axis, 0, 8)
        units = call(graph, ops.dequantize_linear.default, given, like=canonical.x)
        scaled = call(graph, aten.mul.Tensor, (units, static.scale), like=canonical.x)
    product.replace_input_with(canonical.x, scaled)


def kernel_of(product: Node) -> str:
    """The operator that a product of float inputs, canonical or rewritten, must have become in the optimized graph."""
    if (canonical := Matmul.match(product)) is not None:
        return form_at(canonical.weight).kernel
    return form_at_kernel(product).kernel_at(product)
