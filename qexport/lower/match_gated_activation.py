"""What stands between the two linears of an expert, told from the graph."""

from typing import Any

import torch
from torch.fx import Node

from ..graph.edit import is_call, shape_of
from ..graph.schema import bind
from ..graph.views import Add, Item, Mul, Operand, Slice, size_at
from .moe_form import INF, Gate

aten = torch.ops.aten
# What says how large the parts are, and what it is for halves: of features, one or both.
_HALVES: dict[Any, tuple[str, Any]] = {
    aten.chunk.default: ("chunks", lambda half: 2),
    aten.split.Tensor: ("split_size", lambda half: half),
    aten.split_with_sizes.default: ("split_sizes", lambda half: [half, half]),
}
_PLAIN: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}


def gate_of(value: Node, result: Node) -> Gate | None:
    """How a value is made of the result of a linear; None where that is nothing that `ops.experts.gate` does."""
    if is_call(value, *_PLAIN) and bind(value).self is result:
        return Gate(_PLAIN[value.target])
    if is_call(value, aten.gelu.default):
        given = bind(value)
        return Gate("gelu") if given.self is result and given.approximate == "tanh" else None
    if (product := Mul.match(value)) is None:
        return None
    for swish, linear in (product.operands, product.operands[::-1]):
        if (found := _swish(swish)) and (gate := _swiglu(*found, *_shifted(linear), result)):
            return gate
    return None


def _swiglu(g: Operand, alpha: float, linear: Operand, beta: float, result: Node) -> Gate | None:
    """g * sigmoid(alpha * g) * (linear + beta), if g and linear are the halves of the result, at most clamped."""
    g, least, limit = _clamped(g)
    linear, low, high = _clamped(linear)
    if least != -INF or (low, high) != (-limit, limit):
        return None
    first, second = _half(g, result), _half(linear, result)
    if first is None or second is None or (first[0], second[0]) != (0, 1) or first[1] != second[1]:
        return None
    return Gate("swiglu", first[1], alpha, beta, limit)


def _swish(value: Operand) -> tuple[Node, float] | None:
    """(x, a) of x * sigmoid(a * x)."""
    if isinstance(value, Node) and is_call(value, aten.silu.default):
        return bind(value).self, 1.0
    if (product := Mul.match(value)) is None:
        return None
    for x, other in (product.operands, product.operands[::-1]):
        if isinstance(x, Node) and isinstance(other, Node) and is_call(other, aten.sigmoid.default):
            inside = bind(other).self
            if inside is x:
                return x, 1.0
            scaled = Mul.match(inside)
            if scaled is not None and scaled.x is x and isinstance(scaled.other, (int, float)):
                return x, float(scaled.other)
    return None


def _shifted(value: Operand) -> tuple[Operand, float]:
    """(x, b) of x + b."""
    shifted = Add.match(value)
    if shifted is not None and isinstance(shifted.other, (int, float)) and shifted.alpha == 1:
        return shifted.x, float(shifted.other)
    return value, 0.0


def _clamped(value: Operand) -> tuple[Operand, float, float]:
    """(x, smallest, largest)."""
    if not isinstance(value, Node) or not is_call(value, aten.clamp.default):
        return value, -INF, INF
    given = bind(value)
    return (
        given.self, -INF if given.min is None else float(given.min), INF if given.max is None else float(given.max),
    )  # fmt: skip


def _half(value: Operand, result: Node) -> tuple[int, bool] | None:
    """Which half of the result's features a value is, and whether it is every other one of them."""
    size, last = size_at(result, -1), (-1, len(shape_of(result)) - 1)
    if (item := Item.match(value)) is not None:
        if not is_call(item.source, *_HALVES):
            return None
        given, (name, halves) = bind(item.source), _HALVES[item.source.target]
        whole = given.self is result and given.dim in last and getattr(given, name) == halves(size // 2)
        return (item.index, False) if whole else None
    cut = Slice.match(value)
    if cut is None or cut.x is not result or cut.dim not in last:
        return None
    start, stop = cut.bounds
    if isinstance(start, Node) or isinstance(stop, Node):
        return None
    if cut.step == 2 and start in (0, 1) and stop >= size:
        return start, True
    if cut.step == 1 and start in (0, size // 2) and min(stop, size) == start + size // 2:
        return int(start > 0), False
    return None
