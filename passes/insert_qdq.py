"""Putting quantized weights into a graph: the canonical forms that every target reads."""

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import call
from ..graph.meta import Meta
from ..graph.sites import Linear
from ..quant.formats import IntegerFormat, QuantizedWeight
from .formats import form_for

aten = torch.ops.aten
_PLANE = IntegerFormat(8)


def insert_weight(
    module: GraphModule, linear: Linear, weight: QuantizedWeight, factor: torch.Tensor | None = None, shares: str = ""
) -> Node:
    """Replace linear(x, W, b) by matmul(x, W [K, N] in the form of its format) + b, the layout that ONNX Runtime fuses.

    A factor that varies inside the sum over features would be rounded away by the codes of most formats. There the
    weight is the sum of two int8 planes; the second rounds what the first left, to a 254th of its step (section 1 of
    CrossQuant, arXiv 2410.07505, wants the weight rounded without the factor).

    Args:
        factor: [K], of the input features, which the rounding has not seen; None is 1.
        shares: name of the embedding or linear whose tensors these are; empty where they are the linear's own.

    Returns:
        The node of the result.
    """
    planes = [(linear.name, weight)]
    if factor is not None and not weight.format.folds_columns:
        first, second = _planes(weight.dequantize() * factor)
        planes, factor = [(linear.name, first), (f"{linear.name}.plane2", second)], None
    with module.graph.inserting_before(linear.node):
        products = []
        for name, plane in planes:
            dequantized = form_for(plane.format).insert(module, shares or name, plane, factor)
            product = call(module.graph, aten.matmul.default, (linear.input, dequantized), like=linear.node)
            product.meta[Meta.LINEAR] = name
            products.append(product)
        for product in products[1:]:
            product.meta[Meta.PLANE_OF] = linear.name
        return _finish(module, linear, products)


def _planes(weight: torch.Tensor) -> tuple[QuantizedWeight, QuantizedWeight]:
    first = _PLANE.round_to_nearest(weight)
    return first, _PLANE.round_to_nearest(weight - first.dequantize())


def add_branch(module: GraphModule, name: str, branch: Node) -> Node:
    """Add the value of a branch to the result of a quantized linear, whose readers then read the sum.

    Args:
        name: of the linear.
        branch: a node of the result's shape.
    """
    graph = module.graph
    result = result_of(module, name)
    with graph.inserting_after(max(result, branch)):
        total = call(graph, aten.add.Tensor, (result, branch), like=result)
    result.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    total.meta[Meta.RESULT_OF] = result.meta.pop(Meta.RESULT_OF)
    return total


def result_of(module: GraphModule, name: str) -> Node:
    """The node that holds the result of a rounded linear."""
    found: Node = next(node for node in module.graph.nodes if node.meta.get(Meta.RESULT_OF) == name)
    return found


def _finish(module: GraphModule, linear: Linear, products: list[Node]) -> Node:
    """The sum of the products and the bias in the place of the linear."""
    graph, node = module.graph, linear.node
    result = products[0]
    for addend in [*products[1:], *([node.args[2]] if linear.bias is not None else [])]:
        result = call(graph, aten.add.Tensor, (result, addend), like=node)
    if not any(n.meta.get(Meta.RESULT_OF) == linear.name for n in graph.nodes):  # else a branch was added to it before
        result.meta[Meta.RESULT_OF] = linear.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
