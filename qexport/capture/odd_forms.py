"""Operators in forms that PyTorch takes and nothing behind knows."""

import torch
from torch.fx import Graph

from ..graph.views import Cat, LinearCall

aten = torch.ops.aten


def multiply_by_vectors(graph: Graph) -> None:
    """A linear whose weight is one row without an axis for it is a product, and has nothing to quantize."""
    for node in list(graph.nodes):
        found = LinearCall.match(node)
        if found is None or found.weight.meta["val"].dim() != 1:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.matmul.default, (found.x, found.weight))
            product.meta = dict(node.meta)
            made = product
            if found.bias is not None:
                made = graph.call_function(aten.add.Tensor, (product, found.bias))
                made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def leave_out_nothing(graph: Graph) -> None:
    """Join tensors without the empty one of a single axis that PyTorch takes among those of several (a fresh cache)."""
    for node in list(graph.nodes):
        found = Cat.match(node)
        parts = [] if found is None else [part for part in found.tensors if tuple(part.meta["val"].shape) != (0,)]
        if found is None or not parts or len(parts) == len(found.tensors):
            continue
        node.args = (parts, *node.args[1:])
