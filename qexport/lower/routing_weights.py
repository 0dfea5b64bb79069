"""What tokens give each expert of a mixture, and where that is read."""

import operator

import torch
from torch.fx import Node

from ..graph.edit import dtype_of, is_call, shape_of
from ..graph.schema import bind
from ..graph.sites import SHAPE_ONLY, readers
from ..graph.views import Add, Cat, Div, Mul, Slice, size_at

aten = torch.ops.aten
_NEVER_BELOW_ZERO = (
    aten.softmax.int, aten.sigmoid.default, aten.softplus.default, aten.relu.default, aten.exp.default,
    aten.linalg_vector_norm.default,
)  # fmt: skip
_OF_ONE_TENSOR = (
    *SHAPE_ONLY, aten.gather.default, aten.topk.default, aten.sort.default, aten.max.dim, operator.getitem,
    aten.slice.Tensor, aten.unsqueeze.default, aten.expand.default, aten.sum.dim_IntList, aten.sqrt.default,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
_TINY = 1e-6  # what keeps a sum of weights from being zero
_OF_ALL = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar)


def columns(shares: Node) -> list[Node] | None:
    """The share of each expert, [..., 1], in order; None where the shares are read in any other way.

    Args:
        shares: [tokens, experts].
    """
    experts = size_at(shares, -1)
    while len(found := readers(shares)) == 1 and is_call(found[0], *SHAPE_ONLY):
        shares = found[0]
    last = (-1, len(shape_of(shares)) - 1)
    by_expert: dict[int, Node] = {}
    for user in found:
        cut = Slice.match(user)
        if cut is None or cut.dim not in last or shape_of(user)[-1] != 1 or not isinstance(cut.bounds[0], int):
            return None
        by_expert[cut.bounds[0]] = user
    return [by_expert[e] for e in range(experts)] if set(by_expert) == set(range(experts)) else None


def sum_of(weights: Node) -> float | None:
    """What the weights of every token's experts [tokens, chosen] add up to, where the graph says so."""
    if is_call(weights, aten.softmax.int) and bind(weights).dim in (-1, 1):
        return 1.0
    scaled = Mul.match(weights)
    if scaled is not None and isinstance(scaled.other, (int, float)):
        inner = sum_of(scaled.x)
        return None if inner is None else inner * scaled.other
    shared = Div.match(weights)
    if shared is None:
        return None
    total, shifted = shared.other, Add.match(shared.other)
    if shifted is not None and isinstance(shifted.other, float) and shifted.other <= _TINY:
        total = shifted.x
    if not isinstance(total, Node) or not is_call(total, aten.sum.dim_IntList):
        return None
    summed = bind(total)
    return 1.0 if summed.dim in ([-1], [1]) and summed.self is shared.x else None


def never_negative(value: object) -> bool:
    """Whether a value, a number or a node, cannot be below zero, as far as the graph tells."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if is_call(value, *_NEVER_BELOW_ZERO):
        return True
    if is_call(value, aten.clamp.default, aten.clamp_min.default) and never_negative(bind(value).min):
        return True
    if is_call(value, *_OF_ONE_TENSOR):
        return never_negative(value.all_input_nodes[0])
    if (parts := Cat.match(value)) is not None:
        return all(map(never_negative, parts.tensors))
    if is_call(value, *_OF_ALL):
        given = vars(bind(value)).values()
        return all(never_negative(a) for a in given if not (isinstance(a, Node) and dtype_of(a) == torch.bool))
    return False
