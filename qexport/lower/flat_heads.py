"""Heads side by side in one row for each token, as GroupQueryAttention reads and writes them."""

import torch
from torch.fx import Graph, Node

from ..graph.edit import call, is_call, shape_of
from ..graph.schema import bind
from ..graph.sites import SHAPE_ONLY
from ..graph.views import operand, size_at

aten = torch.ops.aten


def flat_heads(graph: Graph, node: Node) -> Node:
    """[batch, heads, sequence, head_dim] as [batch, sequence, heads * head_dim]."""
    heads, size = size_at(node, 1), size_at(node, 3)
    if is_call(node, aten.rms_norm.default):  # a norm of every head does not mind
        norm = bind(node)
        if (before := _heads_swapped(norm.input)) is not None:
            arguments = (before, norm.normalized_shape, norm.weight, norm.eps)
            normalized = call(graph, aten.rms_norm.default, arguments, like=before)
            node = call(graph, aten.transpose.int, (normalized, 1, 2), like=node)
    if (before := _heads_swapped(node)) is not None:
        node = before
    else:
        batch, _, sequence, _ = shape_of(node)
        node = call(graph, aten.transpose.int, (node, 1, 2), like=node, shape=(batch, sequence, heads, size))
    if is_call(node, *SHAPE_ONLY):
        flat = operand(node)
        if len(shape_of(flat)) == 3 and shape_of(flat)[-1] == heads * size:
            return flat
    sizes = [call(graph, aten.sym_size.int, (node, i), like=node, dtype=torch.int64, shape=()) for i in (0, 1)]
    shape = (*shape_of(node)[:2], heads * size)
    return call(graph, aten.reshape.default, (node, [*sizes, heads * size]), like=node, shape=shape)


def flatten_users(graph: Graph, old: Node, flat: Node) -> None:
    """Readers of an output [batch, sequence, heads, head_dim]: most flatten it and get it flat at once."""
    for user in list(old.users):
        if is_call(user, *SHAPE_ONLY) and shape_of(user)[1:] == shape_of(flat)[1:]:
            user.replace_all_uses_with(flat)
    if old.users:
        with graph.inserting_after(flat):
            sizes = [call(graph, aten.sym_size.int, (flat, i), like=flat, dtype=torch.int64, shape=()) for i in (0, 1)]
        with graph.inserting_before(old):
            shaped = call(graph, aten.view.default, (flat, [*sizes, *shape_of(old)[2:]]), like=old)
        old.replace_all_uses_with(shaped)


def _heads_swapped(node: Node) -> Node | None:
    """The value whose axes 1 and 2 of four a node exchanges; None where it does something else."""
    if not is_call(node, aten.transpose.int, aten.permute.default):
        return None
    given = bind(node)
    order = [0, 1, 2, 3]
    if is_call(node, aten.permute.default):
        order = list(given.dims)
    else:
        order[given.dim0], order[given.dim1] = order[given.dim1], order[given.dim0]
    return given.self if order == [0, 2, 1, 3] else None
