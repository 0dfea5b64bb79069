"""Putting quantized weights into a graph: the canonical forms that every target reads."""

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import add_tensor, call, shape_of
from ..graph.sites import Linear
from ..quant.affine import QuantizedWeight, quantize_weight
from ..quant.expand import expanded_scale
from ..quant.formats import PER_CHANNEL, PER_TENSOR, WeightFormat

aten = torch.ops.aten
ops = torch.ops.qexport


def insert_weight(module: GraphModule, linear: Linear, weight: QuantizedWeight, shares: str = "") -> Node:
    """Replace linear(x, W, b) by matmul(x, dequantize(codes [K, N], scale)) + b, the layout that ONNX Runtime fuses.

    Args:
        shares: name of the embedding whose tensors these are; empty where they are the linear's own.

    Returns:
        The node of the result.
    """
    with module.graph.inserting_before(linear.node):
        dequantized = _dequantized(module, shares or linear.name, weight)
        product = _product(module, linear, linear.name, dequantized)
        if shares:
            product.meta["shares"] = shares
        return _finish(module, linear, [product])


def insert_planes(module: GraphModule, linear: Linear, weight: QuantizedWeight, factor: torch.Tensor) -> Node:
    """The same for a rounded weight times a factor for each column, as the sum of two int8 planes.

    The factor varies inside the sum over features, so one plane would round it away; the second rounds what the first
    left, to a 254th of its step (section 1 of CrossQuant, arXiv 2410.07505, wants the weight rounded without it).

    Args:
        factor: [K], of the input features.
    """
    target = weight.dequantize() * factor
    first = quantize_weight(target, WeightFormat(8))
    second = quantize_weight(target - first.dequantize(), WeightFormat(8))
    with module.graph.inserting_before(linear.node):
        products = []
        for name, plane in ((linear.name, first), (f"{linear.name}.plane2", second)):
            products.append(_product(module, linear, name, _dequantized(module, name, plane)))
        products[1].meta["plane_of"] = linear.name
        return _finish(module, linear, products)


def insert_expanded(
    module: GraphModule, linear: Linear, weight: QuantizedWeight, factor: torch.Tensor | None = None
) -> Node:
    """The same with codes in groups that become int8 codes per channel, times `factor` [K], when the file is loaded."""
    graph, name, fmt = module.graph, linear.name, weight.format
    with graph.inserting_before(linear.node):
        codes = add_tensor(graph, f"{name}.weight_codes", weight.codes.t().contiguous())
        scale = add_tensor(graph, f"{name}.weight_scale", weight.scale.t().contiguous())
        zero_point = None
        if weight.zero_point is not None:
            zero_point = add_tensor(graph, f"{name}.weight_zero_point", weight.zero_point.t().contiguous())
        factors = None if factor is None else add_tensor(graph, f"{name}.column_factor", factor.clone())
        row_scale = add_tensor(graph, f"{name}.row_scale", expanded_scale(weight, factor))
        arguments = (codes, scale, zero_point, factors, row_scale, fmt.group_size, fmt.stored_bits)
        wide = call(graph, ops.expand_codes.default, arguments, like=codes, dtype=torch.int8)
        arguments, shape = (wide, row_scale, None, 1, 0, 8), shape_of(codes)
        dequantized = call(graph, ops.dequantize_linear.default, arguments, like=row_scale, shape=shape)
        return _finish(module, linear, [_product(module, linear, name, dequantized)])


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
    total.meta["result_of"] = result.meta.pop("result_of")
    return total


def result_of(module: GraphModule, name: str) -> Node:
    """The node that holds the result of a rounded linear."""
    return next(node for node in module.graph.nodes if node.meta.get("result_of") == name)


def _dequantized(module: GraphModule, name: str, weight: QuantizedWeight) -> Node:
    graph, fmt = module.graph, weight.format
    if fmt.codebook is not None:
        codes = add_tensor(graph, f"{name}.weight_codes", weight.codes)
        scale = add_tensor(graph, f"{name}.weight_scale", weight.scale)
        arguments = (codes, scale, fmt.codebook, fmt.group_size)
        rows, columns = weight.shape
        return call(graph, ops.dequantize_codebook.default, arguments, like=scale, shape=(columns, rows))
    codes, scale, zero_point = weight_tensors(module, name, weight)
    axis, group_size = (0, fmt.group_size) if fmt.group_size not in (PER_CHANNEL, PER_TENSOR) else (1, 0)
    arguments = (codes, scale, zero_point, axis, group_size, fmt.stored_bits)
    return call(graph, ops.dequantize_linear.default, arguments, like=scale, shape=shape_of(codes))


def weight_tensors(module: GraphModule, name: str, weight: QuantizedWeight) -> tuple[Node, Node, Node | None]:
    """Codes, scales and zero points of an integer grid as `dequantize_linear` wants them: codes [K, N]."""
    graph, fmt = module.graph, weight.format
    per_group = fmt.group_size not in (PER_CHANNEL, PER_TENSOR)

    def layout(t: torch.Tensor) -> torch.Tensor:  # [N, G] as the operator wants it
        if fmt.group_size == PER_TENSOR:
            return t.reshape(())
        return t.t().contiguous() if per_group else t.reshape(-1)

    codes = add_tensor(graph, f"{name}.weight_codes", weight.codes.t().contiguous())
    scale = add_tensor(graph, f"{name}.weight_scale", layout(weight.scale))
    zero_point = None
    if weight.zero_point is not None:
        zero_point = add_tensor(graph, f"{name}.weight_zero_point", layout(weight.zero_point))
    return codes, scale, zero_point


def _product(module: GraphModule, linear: Linear, name: str, dequantized: Node) -> Node:
    product = call(module.graph, aten.matmul.default, (linear.input, dequantized), like=linear.node)
    product.meta["linear"] = name
    return product


def _finish(module: GraphModule, linear: Linear, products: list[Node]) -> Node:
    """The sum of the products and the bias in the place of the linear."""
    graph, node = module.graph, linear.node
    result = products[0]
    for addend in [*products[1:], *([node.args[2]] if linear.bias is not None else [])]:
        result = call(graph, aten.add.Tensor, (result, addend), like=node)
    if not any(n.meta.get("result_of") == linear.name for n in graph.nodes):  # else a branch was added to it before
        result.meta["result_of"] = linear.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
