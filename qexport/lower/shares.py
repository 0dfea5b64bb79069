"""What tokens give each expert of a mixture, and where that is read."""

import operator

import torch
from torch.fx import Node

from ..passes.edit import dtype_of, is_call, shape_of
from ..passes.sites import SHAPE_ONLY, readers

aten = torch.ops.aten
_NEVER_BELOW_ZERO = (aten.softmax.int, aten.sigmoid.default, aten.softplus.default, aten.relu.default, aten.exp.default)
_OF_ONE_TENSOR = (
    *SHAPE_ONLY, aten.gather.default, aten.topk.default, aten.sort.default, aten.max.dim, operator.getitem,
    aten.slice.Tensor, aten.unsqueeze.default, aten.expand.default, aten.sum.dim_IntList, aten.sqrt.default,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
_TINY = 1e-6  # what keeps a sum of weights from being zero
_OF_PARTS = (aten.cat.default, aten.concat.default)
_OF_ALL = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar)


def columns(shares: Node) -> list[Node] | None:
    """The share of each expert, [..., 1], in order; None where the shares are read in any other way.

    Args:
        shares: [tokens, experts].
    """
    experts = shape_of(shares)[-1]
    while len(found := readers(shares)) == 1 and is_call(found[0], *SHAPE_ONLY):
        shares = found[0]
    last = (-1, len(shape_of(shares)) - 1)
    by_expert: dict[int, Node] = {}
    for user in found:
        if not is_call(user, aten.slice.Tensor) or user.args[1] not in last or shape_of(user)[-1] != 1:
            return None
        by_expert[user.args[2]] = user
    return [by_expert[e] for e in range(experts)] if set(by_expert) == set(range(experts)) else None


def sum_of(weights: Node) -> float | None:
    """What the weights of every token's experts [tokens, chosen] add up to, where the graph says so."""
    if is_call(weights, aten.softmax.int) and weights.args[1] in (-1, 1):
        return 1.0
    if is_call(weights, aten.mul.Tensor) and isinstance(weights.args[1], (int, float)):
        inner = sum_of(weights.args[0])
        return None if inner is None else inner * weights.args[1]
    if is_call(weights, aten.div.Tensor) and isinstance(weights.args[1], Node):
        total = weights.args[1]
        if is_call(total, aten.add.Tensor) and isinstance(total.args[1], float) and total.args[1] <= _TINY:
            total = total.args[0]
        summed = is_call(total, aten.sum.dim_IntList) and list(total.args[1]) in ([-1], [1])
        if summed and total.args[0] is weights.args[0]:
            return 1.0
    return None


def never_negative(value) -> bool:
    """Whether a value, a number or a node, cannot be below zero, as far as the graph tells."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if is_call(value, *_NEVER_BELOW_ZERO):
        return True
    if is_call(value, aten.clamp.default, aten.clamp_min.default) and never_negative((*value.args, None)[1]):
        return True
    if is_call(value, *_OF_ONE_TENSOR):
        return never_negative(value.args[0])
    if is_call(value, *_OF_PARTS):
        return all(map(never_negative, value.args[0]))
    if is_call(value, *_OF_ALL):
        return all(never_negative(a) for a in value.args if not (isinstance(a, Node) and dtype_of(a) == torch.bool))
    return False
