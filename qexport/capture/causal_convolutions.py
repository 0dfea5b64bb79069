"""Causal convolutions over a text, which models write out as padded ones of past and new inputs, as one node."""

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.edit import is_call
from ..graph.schema import bind
from ..graph.sites import readers
from ..graph.views import END, Cat, Slice, operand

aten, ops = torch.ops.aten, torch.ops.qexport


def fuse_causal_convolutions(graph: Graph) -> None:
    """Replace them in place: cat(past, new), a convolution of each channel, its results at the new places.

    What is returned as the new past has to be the end of the same inputs. Whatever differs stays as it was written.
    """
    for node in list(graph.nodes):
        if not is_call(node, aten.conv1d.default):
            continue
        given = bind(node)
        joined, result = Cat.match(given.input), _at_new_places(node)
        if joined is None or result is None or len(joined.tensors) != 2 or joined.dim not in (-1, 2):
            continue
        past, new = joined.tensors
        channels, _, width = given.weight.meta["val"].shape
        plain = (given.stride, given.padding, given.dilation, given.groups) == ([1], [width - 1], [1], channels)
        kept = [user for user in readers(given.input) if user is not node]
        sizes_fit = _sizes_are(past, width - 1) and all(_sizes_are(user, width - 1) for user in kept)
        if plain and sizes_fit and past.op == "placeholder" and _long_as(result, new) and all(map(_is_end, kept)):
            _replace(graph, (new, _stored(given.weight), given.bias, past), node, result, kept)


def _at_new_places(convolution: Node) -> Node | None:
    """The results without those that stand for padding behind, and for the past."""
    found = readers(convolution)
    first = Slice.match(found[0]) if len(found) == 1 else None
    if first is None or first.dim % 3 != 2 or first.step != 1 or first.bounds[0] not in (0, None):
        return None
    if not _long_as(found[0], operand(convolution)):
        return None
    found = readers(found[0])
    if len(found) == 1 and is_call(found[0], aten.silu.default):  # of every place, whichever are taken
        found = readers(found[0])
    return found[0] if len(found) == 1 and _is_end(found[0]) else None


def _is_end(node: Node) -> bool:
    """Whether a node takes the last ones of a value: from a place that is counted from the end."""
    cut = Slice.match(node)
    if cut is None or cut.dim % 3 != 2 or cut.step != 1 or (cut.end is not None and not _is_far(cut.end)):
        return False
    start = cut.start
    return is_call(start, operator.neg) if isinstance(start, Node) else start is not None and start < 0


def _is_far(end: int | Node) -> bool:
    return isinstance(end, int) and end >= END


def _long_as(node: Node, other: Node) -> bool:
    return bool(statically_known_true(node.meta["val"].shape[-1] == other.meta["val"].shape[-1]))


def _sizes_are(node: Node, width: int) -> bool:
    return bool(statically_known_true(node.meta["val"].shape[-1] == width))


def _stored(weight: Node) -> Node:
    """The weight itself, in front of axes that are taken away and put back."""
    at, shape = weight, weight.meta["val"].shape
    while is_call(at, aten.squeeze.dim, aten.unsqueeze.default):
        at = operand(at)
    return at if at.meta["val"].shape == shape else weight


def _replace(graph: Graph, inputs: tuple, convolution: Node, result: Node, kept: list[Node]) -> None:
    values = [given.meta["val"] if isinstance(given, Node) else given for given in inputs]
    made = ops.causal_convolution.default(*values)
    with graph.inserting_before(result):
        fused = graph.call_function(ops.causal_convolution.default, inputs)
        fused.meta = {**convolution.meta, "val": made}
        parts = [graph.call_function(operator.getitem, (fused, place)) for place in range(2)]
        for part, value in zip(parts, made, strict=True):
            part.meta = {**convolution.meta, "val": value}
        activation = operand(result)
        if is_call(activation, aten.silu.default):
            active = graph.call_function(aten.silu.default, (parts[0],))
            active.meta = {**activation.meta, "val": made[0]}
            parts[0] = active
    result.replace_all_uses_with(parts[0])
    for user in kept:
        user.replace_all_uses_with(parts[1])
