"""Reading a quantized linear back from the canonical graph."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ...passes.edit import add_tensor, call, is_call

aten = torch.ops.aten
ops = torch.ops.qexport


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
    block_size = weight.args[4]
    if is_call(x, ops.dequantize_linear.default):
        token_scale = None
        users = [
            u for u in product.users if is_call(u, aten.mul.Tensor) and is_call(u.args[1], ops.token_scale.default)
        ]
        if users:
            token_scale = users[0].args[1]
        return Form(block_size, x.args[0], x, token_scale)
    if is_call(x, aten.mul.Tensor) and is_call(x.args[0], ops.dequantize_linear.default):
        return Form(block_size, x.args[0].args[0], x.args[0], x.args[1])
    return Form(block_size)


def scale_apart(module: GraphModule, product: Node, form: Form) -> None:
    """dequantize(codes, s) becomes dequantize(codes, 1) * s, in place, where one static scale feeds a weight in groups.

    ONNX Runtime makes no MatMulNBits of a product that reads a DequantizeLinear.
    """
    if form.dequantize is None or form.token_scale is not None:
        return
    graph, codes, scale = module.graph, form.quantize, form.dequantize.args[1]
    with graph.inserting_before(form.dequantize):
        one = add_tensor(graph, f"{product.meta['linear']}.unit_scale", torch.ones((), dtype=torch.float32))
    with graph.inserting_after(form.dequantize):
        scaled = call(graph, aten.mul.Tensor, (form.dequantize, scale), like=form.dequantize)
    form.dequantize.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    form.dequantize.args = (codes, one, *form.dequantize.args[2:])
