"""Reading a quantized linear back from the canonical graph."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ...numerics.packing import stored_block
from ...passes.edit import WITHOUT_OUTLIERS, call, is_call

aten = torch.ops.aten
ops = torch.ops.qexport

# Blocks that ONNX Runtime splits weights with one scale per channel into when it makes MatMulNBits of them
# (session.qdq_matmulnbits_block_size, its default).
DEFAULT_BLOCK = 32

_OWN_KERNELS = {ops.matmul_bnb4.default: "MatMulBnb4", ops.matmul_nbits.default: "MatMulNBits"}


@dataclass(frozen=True)
class Form:
    """How one product of the canonical graph is quantized.

    Attributes:
        block_size: of the weight; 0 for one scale per channel or tensor.
        quantize, dequantize: of the activation; None where it is float.
        token_scale: of a dynamic activation; None where it is static.
    """

    block_size: int
    quantize: Node | None = None
    dequantize: Node | None = None
    token_scale: Node | None = None

    @property
    def integer(self) -> bool:
        """Whether the product can run as one integer matmul: both sides 8 bits, scales outside the sum."""
        return self.quantize is not None and self.block_size == 0


def linear_products(graph: Graph) -> list[Node]:
    """The matmul of every quantized linear."""
    return [n for n in graph.nodes if "linear" in n.meta]


def form_of(product: Node) -> Form:
    """The form of a canonical product, or of one already rewritten for the CPU."""
    x, weight = product.args
    block_size = weight.args[4 if is_call(weight, ops.dequantize_linear.default) else 3]
    if is_call(x, ops.dequantize_linear.default):
        token_scale = None
        users = [u for u in product.users if is_call(u, aten.mul.Tensor) and _is_step(u.args[1])]
        if users:
            token_scale = users[0].args[1]
        return Form(block_size, x.args[0], x, token_scale)
    if is_call(x, aten.mul.Tensor) and is_call(x.args[0], ops.dequantize_linear.default):
        return Form(block_size, x.args[0].args[0], x.args[0], x.args[1])
    return Form(block_size)


def input_of(product: Node) -> Node:
    """The float value that a product reads, before it is rounded; of a canonical product, or one rewritten."""
    node = product.args[0]
    while (before := _unrounded(_uncast(node))) is not None:
        node = before
    return node


def _uncast(node: Node) -> Node:
    while is_call(node, aten.to.dtype):
        node = node.args[0]
    return node


def _unrounded(node: Node) -> Node | None:
    """What a step of rounding a value reads; None of a node that is no such step."""
    if is_call(node, ops.matmul_nbits_input.default, ops.quantize_linear.default, ops.dequantize_linear.default):
        return node.args[0]
    if is_call(node, aten.div.Tensor) and _is_step(node.args[1]):
        return node.args[0]
    if not is_call(node, aten.mul.Tensor):
        return None
    inner, factor = node.args
    if node.meta.get(WITHOUT_OUTLIERS) or is_call(inner, ops.dequantize_linear.default):
        return inner
    # A value held within the range of few bits, and CrossQuant's rounding on floats.
    if is_call(inner, aten.clamp.default, aten.round.default) and is_call(inner.args[0], aten.div.Tensor):
        return inner.args[0].args[0] if inner.args[0].args[1] is factor else None
    return None


def _is_step(node) -> bool:
    """Whether a node is the step of a dynamic activation: a token's scale, or the larger of two."""
    node = _uncast(node)
    parts = node.args if is_call(node, aten.maximum.default) else (node,)
    return all(is_call(_uncast(part), ops.token_scale.default) for part in parts)


def as_own_kernel(module: GraphModule, product: Node) -> None:
    """matmul(x, dequantize(...)) of a weight in groups becomes the one node that ONNX Runtime would make of the two.

    It would do so while it loads the file, which then takes twice as long, and by session entries that a caller may
    forget. Codebooks, 2-bit codes and blocks above 256 it would not fuse at all. One scale per channel is left to it:
    it repeats the scale for every block, which the file need not.
    """
    x, weight = product.args
    if is_call(weight, ops.dequantize_codebook.default):
        target, arguments = ops.matmul_bnb4.default, (*weight.args, stored_block(4, weight.args[3]))
    else:
        codes, scale, zero_point, _axis, group_size, bits = weight.args
        if group_size == 0:
            return
        block_size = stored_block(bits, group_size)
        target, arguments = ops.matmul_nbits.default, (codes, scale, zero_point, bits, group_size, block_size)
    with module.graph.inserting_before(product):
        node = call(module.graph, target, (x, *arguments), like=product)
    node.meta = dict(product.meta)
    product.replace_all_uses_with(node)
    module.graph.erase_node(product)


def own_kernel(product: Node) -> str | None:
    """The operator of a product that `as_own_kernel` rewrote."""
    return _OWN_KERNELS.get(product.target)
