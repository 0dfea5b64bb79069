"""A product with one factor of a low-rank branch, which is kept in float or in int8."""

import torch
from torch.fx import GraphModule, Node

from ...graph.edit import add_tensor, call, shape_of
from ...graph.meta import Meta
from ...quant.lowrank import quantize_factor

aten = torch.ops.aten
ops = torch.ops.qexport


def product_of(
    module: GraphModule, x: Node, name: str, factor: torch.Tensor, owner: str, int8: bool
) -> tuple[Node, torch.Tensor]:
    """x times a factor, and the factor as it is stored.

    Args:
        name: of its tensors.
        factor: [K, rank] or [rank, N].
        owner: the linear whose branch it is part of.
        int8: with one scale for each column.
    """
    graph, shape = module.graph, (*shape_of(x)[:-1], factor.shape[1])
    if not int8:
        product = call(graph, aten.matmul.default, (x, add_tensor(graph, name, factor)), like=x, shape=shape)
        product.meta[Meta.BRANCH_OF] = owner
        return product, factor
    quantized = quantize_factor(factor)
    codes = add_tensor(graph, f"{name}_codes", quantized.codes.t().contiguous())
    scale = add_tensor(graph, f"{name}_scale", quantized.scale.reshape(-1))
    arguments = (codes, scale, None, 1, 0, 8)
    dequantized = call(graph, ops.dequantize_linear.default, arguments, like=scale, shape=shape_of(codes))
    product = call(graph, aten.matmul.default, (x, dequantized), like=x, shape=shape)
    product.meta |= {Meta.LINEAR: name, Meta.BRANCH_OF: owner}
    return product, quantized.dequantize().t()
