"""What stands between the two linears of an expert, told from the graph."""

import operator

import torch
from torch.fx import Node

from ..passes.edit import is_call, shape_of
from .targets.qmoe import INF, Gate

aten = torch.ops.aten
_END = 2**63 - 1
_SPLITS = (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
_PLAIN = {aten.relu.default: "relu", aten.silu.default: "silu"}


def gate_of(value: Node, result: Node) -> Gate | None:
    """How a value is made of the result of a linear; None where that is nothing that `ops.experts.gate` does."""
    if value.args[:1] == (result,):
        if is_call(value, *_PLAIN):
            return Gate(_PLAIN[value.target])
        if is_call(value, aten.gelu.default) and value.kwargs.get("approximate") == "tanh":
            return Gate("gelu")
    if not is_call(value, aten.mul.Tensor):
        return None
    for swish, linear in (value.args, value.args[::-1]):
        if (found := _swish(swish)) and (gate := _swiglu(*found, *_shifted(linear), result)):
            return gate
    return None


def _swiglu(g: Node, alpha: float, linear: Node, beta: float, result: Node) -> Gate | None:
    """g * sigmoid(alpha * g) * (linear + beta), if g and linear are the halves of the result, at most clamped."""
    g, least, limit = _clamped(g)
    linear, low, high = _clamped(linear)
    if least != -INF or (low, high) != (-limit, limit):
        return None
    halves = _half(g, result), _half(linear, result)
    if None in halves or [place for place, _ in halves] != [0, 1] or halves[0][1] != halves[1][1]:
        return None
    return Gate("swiglu", halves[0][1], alpha, beta, limit)


def _swish(node) -> tuple[Node, float] | None:
    """(x, a) of x * sigmoid(a * x)."""
    if is_call(node, aten.silu.default):
        return node.args[0], 1.0
    if not is_call(node, aten.mul.Tensor):
        return None
    for x, other in (node.args, node.args[::-1]):
        if is_call(other, aten.sigmoid.default):
            inside = other.args[0]
            if inside is x:
                return x, 1.0
            if is_call(inside, aten.mul.Tensor) and inside.args[0] is x and isinstance(inside.args[1], (int, float)):
                return x, float(inside.args[1])
    return None


def _shifted(node) -> tuple[Node, float]:
    """(x, b) of x + b."""
    if is_call(node, aten.add.Tensor) and isinstance(node.args[1], (int, float)) and not node.kwargs:
        return node.args[0], float(node.args[1])
    return node, 0.0


def _clamped(node) -> tuple[Node, float, float]:
    """(x, smallest, largest)."""
    if not is_call(node, aten.clamp.default):
        return node, -INF, INF
    x, low, high = (*node.args, None, None)[:3]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    return x, -INF if low is None else float(low), INF if high is None else float(high)


def _half(node, result: Node) -> tuple[int, bool] | None:
    """Which half of the result's features a value is, and whether it is every other one of them."""
    size, last = shape_of(result)[-1], (-1, len(shape_of(result)) - 1)
    if is_call(node, operator.getitem):
        parts, place = node.args
        if not is_call(parts, *_SPLITS) or parts.args[0] is not result or (*parts.args, 0)[2] not in last:
            return None
        sizes = [2] if is_call(parts, aten.chunk.default) else [size // 2, [size // 2] * 2]
        return (place, False) if parts.args[1] in sizes else None
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not result or node.args[1] not in last:
        return None
    start, stop, step = _span(node)
    if step == 2 and start in (0, 1) and stop >= size:
        return start, True
    if step == 1 and start in (0, size // 2) and min(stop, size) == start + size // 2:
        return int(start > 0), False
    return None


def _span(node: Node) -> tuple[int, int, int]:
    """(start, stop, step) of a slice."""
    start, stop, step = (*node.args[2:], None, None, None)[:3]
    return start or 0, _END if stop is None else stop, step or 1
