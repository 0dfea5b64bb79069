"""Tensors that the model's code allocates and then fills part by part, as the concatenations that they are."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.edit import is_call
from ..graph.schema import bind
from ..graph.views import Slice, operand

aten = torch.ops.aten
_EMPTY = (
    aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default, aten.new_zeros.default,
    aten.zeros.default, aten.zeros_like.default,
)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """source is copied to [start, end) of an axis."""

    axis: int
    start: int
    end: int
    source: Node
    copy: Node


def join_parts(graph: Graph) -> None:
    """y = empty(...); y[..., :n].copy_(a); y[..., n:].copy_(b) becomes y = cat(a, b), in place.

    Parts of one axis that cover it without a gap; others stay, and have no ONNX translation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in [n for n in order if is_call(n, *_EMPTY)]:
        parts = [part for user in node.users if (part := _written(node, user))]
        if not parts or not _cover(node, parts):
            continue
        last = max((part.copy for part in parts), key=order.__getitem__)
        places = [operand(part.copy) for part in parts]
        readers = [user for user in node.users if user not in places]
        if any(order[user] < order[last] for user in readers):
            continue
        parts.sort(key=lambda part: part.start)
        with graph.inserting_after(last):
            joined = graph.call_function(aten.cat.default, ([part.source for part in parts], parts[0].axis))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined, delete_user_cb=readers.__contains__)
        for dead in (*(part.copy for part in parts), *places, node):
            graph.erase_node(dead)


def _written(node: Node, place: Node) -> _Part | None:
    """What is copied to `place`, if that is a slice of `node` which nothing reads."""
    cut = Slice.match(place)
    if cut is None or cut.step != 1 or len(place.users) != 1:
        return None
    copy = next(iter(place.users))
    if not is_call(copy, aten.copy_.default) or operand(copy) is not place or copy.users:
        return None
    value, source = node.meta["val"], bind(copy).src
    axis = cut.dim % value.dim()
    size, same = value.shape[axis], source.meta["val"]
    if not isinstance(size, int) or isinstance(cut.start, Node) or isinstance(cut.end, Node):
        return None
    if same.dtype != value.dtype or not _same_shape(same, place.meta["val"]):
        return None
    start, end, _ = slice(cut.start, cut.end).indices(size)
    return _Part(axis, start, end, source, copy)


def _same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    sizes = zip(one.shape, other.shape, strict=False)
    return one.dim() == other.dim() and all(statically_known_true(a == b) for a, b in sizes)


def _cover(node: Node, parts: list[_Part]) -> bool:
    """Whether the parts are of one axis and touch each other from its beginning to its end."""
    axes, ends = {part.axis for part in parts}, [0]
    for part in sorted(parts, key=lambda part: part.start):
        if part.start != ends[-1]:
            return False
        ends.append(part.end)
    return len(axes) == 1 and ends[-1] == node.meta["val"].shape[axes.pop()]
