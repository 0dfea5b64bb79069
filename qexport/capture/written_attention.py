"""Attention that a model's code writes out itself, as one node: scores, mask, softmax and the weighted sum of values.

Models from before transformers' attention interface compute it in their own classes. What counts is what they compute:
softmax(factor * (query @ keys^T) + bias + mask) @ values, keys and values those of one layer's cache with the new ones
behind, the bias of positions alone (ALiBi, arXiv 2108.12409): it becomes part of the mask. Whatever else is added to
the scores or done with the cache stays as it was written.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ..graph.edit import is_call
from ..graph.ops.attention import MASKED
from ..graph.schema import bind
from ..graph.sites import readers
from ..graph.views import Add, Cat, Div, Mul, Reshape, Transpose, Unsqueeze, operand

aten, ops = torch.ops.aten, torch.ops.qexport
_CASTS = (aten.to.dtype, aten._to_copy.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_LEARNED = (aten.linear.default, aten.embedding.default)
_LOWEST = -1e30  # a bound that no score reaches


@dataclass(frozen=True)
class _Cached:
    """Keys or values of a layer's cache, and the new ones behind: `joined` is both."""

    joined: Node
    past: Node
    new: Node


@dataclass(frozen=True)
class _Scores:
    """factor * (query @ keys^T) + mask, and of every bias its own factor times it."""

    query: Node
    keys: _Cached
    factor: float
    mask: Node
    biases: tuple[tuple[Node, float], ...] = ()


def fuse_written_attention(graph: Graph) -> None:
    """Replace written-out attention over a cache by `cached_attention`, in place."""
    masks = _BiasedMasks(graph)
    for node in list(graph.nodes):
        if not is_call(node, aten.softmax.int, aten._softmax.default) or bind(node).dim not in (-1, _rank(node) - 1):
            continue
        scores, product = _scores(operand(node)), _product(node)
        if scores is None or product is None:
            continue
        values, result = _cached(product.args[1]), _four_axes(product)
        if values is None or result is None or values.joined is scores.keys.joined:
            continue
        if _readers_are_known(scores.keys) and _readers_are_known(values) and masks.can_hold(scores):
            _replace(graph, scores, values, result, masks.of(scores))


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _product(softmax: Node) -> Node | None:
    """The product with the values, of weights that are cast or flattened on the way."""
    at = softmax
    while (user := _only_but_sizes(at)) is not None:
        if is_call(user, *_PRODUCTS):
            return user if user.args[0] is at else None
        if not (is_call(user, *_CASTS) or _keeps_rows(user)):
            return None
        at = user
    return None


def _only_but_sizes(node: Node) -> Node | None:
    """The one reader of a value beside those of its sizes."""
    found = readers(node)
    return found[0] if len(found) == 1 else None


def _four_axes(product: Node) -> Node | None:
    """The weighted sum as [batch, heads, sequence, head_dim]."""
    if _rank(product) == 4:
        return product
    user = _only_but_sizes(product)
    return user if user is not None and _keeps_rows(user) and _rank(user) == 4 else None


def _keeps_rows(node: Node) -> bool:
    """Whether a node joins or parts the axes in front of the last two, or does nothing."""
    if not is_call(node, *Reshape.targets):
        return False
    before, after = operand(node).meta["val"].shape, node.meta["val"].shape
    return all(statically_known_true(a == b) for a, b in zip(before[-2:], after[-2:], strict=True))


def _scores(node: Node) -> _Scores | None:
    """What a softmax reads, where it is a product, factors, one causal mask, and biases."""
    factor, mask, at = 1.0, None, node
    biases: list[tuple[Node, float]] = []
    while True:
        added, hidden = Add.match(at), _hidden(at)
        if is_call(at, *_CASTS) or _keeps_rows(at) or _bounds_nothing(at):
            at = operand(at)
        elif (number := _number(Mul.match(at))) is not None:
            factor, at = factor * number, operand(at)
        elif (number := _number(Div.match(at))) is not None:
            factor, at = factor / number, operand(at)
        elif hidden is not None and mask is None:
            at, mask = hidden
        elif added is not None and added.alpha == 1 and (parts := _beside(added)) is not None:
            at, side = parts
            inside = _hidden(side)
            masking = side if is_call(side, ops.causal_mask.default) else inside[1] if inside else None
            if masking is not None and mask is not None:
                return None
            mask = masking or mask
            if masking is not side:
                biases.append((inside[0] if inside else side, factor))
        else:
            break
    if mask is None or factor <= 0:
        return None
    if is_call(at, aten.baddbmm.default):
        given = bind(at)
        if given.beta and not is_call(given.self, aten.zeros.default):
            if not _of_positions(given.self):
                return None
            biases.append((given.self, factor * given.beta))
        factor, query, transposed = factor * given.alpha, given.batch1, given.batch2
    elif is_call(at, *_PRODUCTS):
        query, transposed = at.args[:2]
    else:
        return None
    turned = Transpose.match(transposed)
    query = operand(query) if _keeps_rows(query) else query
    if turned is None or {turned.dim0 % _rank(turned.x), turned.dim1 % _rank(turned.x)} != _last_two(turned.x):
        return None
    keys = _cached(turned.x)
    if keys is None or _rank(query) != 4:
        return None
    return _Scores(query, keys, float(factor), mask, tuple((bias, float(by)) for bias, by in biases))


def _hidden(node: Any) -> tuple[Node, Node] | None:
    """A value whose elements that a causal mask hides are replaced by the lowest number, and that mask."""
    if not is_call(node, aten.masked_fill.Scalar) or bind(node).value > _LOWEST:
        return None
    where = bind(node).mask
    truth = is_call(where, *_CASTS) and where.meta["val"].dtype == torch.bool
    below = is_call(where, aten.lt.Scalar) and MASKED < bind(where).other <= 0
    source = operand(where) if truth or below else None
    return (operand(node), source) if is_call(source, ops.causal_mask.default) else None


def _beside(added: Add) -> tuple[Node, Node] | None:
    """The two sides of a sum, first the one that is not of positions alone; None where that is neither or both."""
    if not isinstance(added.other, Node):
        return None
    alone = [_of_positions(side) for side in (added.x, added.other)]
    return None if alone[0] == alone[1] else (added.other, added.x) if alone[0] else (added.x, added.other)


def _of_positions(node: Node) -> bool:
    """Whether a value is made without anything that a linear, a product or an embedding made."""
    waiting, seen = [node], set[Node]()
    while waiting:
        at = waiting.pop()
        if is_call(at, *_PRODUCTS, *_LEARNED):
            return False
        if at not in seen and not is_call(at, aten.sym_size.int):
            seen.add(at)
            waiting += at.all_input_nodes
    return True


class _BiasedMasks:
    """Masks of a graph with the biases that are added to scores beside them, each made once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._made: dict[tuple, Node] = {}

    @staticmethod
    def can_hold(scores: _Scores) -> bool:
        """Whether every bias is one number for a key and a head, or for all heads."""
        shapes = [bias.meta["val"].shape for bias, _ in scores.biases]
        return all(len(shape) in (3, 4) and statically_known_true(shape[-2] == 1) for shape in shapes)

    def of(self, scores: _Scores) -> Node:
        """[batch, heads, sequence, past + sequence], or the mask itself where there is no bias."""
        key = (scores.mask, *scores.biases)
        if not scores.biases or key in self._made:
            return self._made.get(key, scores.mask)
        place = max((scores.mask, *(bias for bias, _ in scores.biases)), key=self._order.__getitem__)
        heads, after = scores.query.meta["val"].shape[1], place.next
        with self._graph.inserting_before(after):
            total = scores.mask
            for bias, factor in scores.biases:
                if _rank(bias) == 3:
                    size = self._call(place, aten.sym_size.int, bias, 2)
                    bias = self._call(place, aten.reshape.default, bias, [-1, heads, 1, size])
                if factor != 1:
                    bias = self._call(place, aten.mul.Tensor, bias, factor)
                total = self._call(place, aten.add.Tensor, total, bias)
        self._made[key] = total
        return total

    def _call(self, like: Node, target: Any, *args: Any) -> Node:
        node = self._graph.call_function(target, args)
        node.meta = {**like.meta, "val": target(*map_arg(args, lambda given: given.meta["val"]))}
        return node


def _last_two(node: Node) -> set[int]:
    return {_rank(node) - 2, _rank(node) - 1}


def _number(found: Mul | Div | None) -> float | None:
    """The number that a value is multiplied or divided by."""
    return float(found.other) if found is not None and isinstance(found.other, (int, float)) and found.other else None


def _bounds_nothing(node: Node) -> bool:
    """Whether a node is the larger one of a value and the lowest number there is."""
    if not is_call(node, aten.clamp.default):
        return False
    bounds = bind(node)
    return bounds.max is None and isinstance(bounds.min, float) and bounds.min < _LOWEST


def _cached(node: Any) -> _Cached | None:
    """What is past of a layer with the new behind, whether heads are repeated or not; None for anything else."""
    if not isinstance(node, Node):
        return None
    at = node
    while is_call(at, *_CASTS) or _keeps_rows(at):
        at = operand(at)
    at = _before_repeated(at)
    joined = Cat.match(at)
    if joined is None or len(joined.tensors) != 2 or joined.dim not in (2, -2) or _rank(at) != 4:
        return None
    past, new = joined.tensors
    return _Cached(at, past, new) if past.op == "placeholder" else None


def _before_repeated(node: Node) -> Node:
    """The heads that a node has several times in a row each: reshape(expand(unsqueeze(x, 2)))."""
    reshaped = Reshape.match(node)
    if reshaped is None or not is_call(reshaped.x, aten.expand.default):
        return node
    wide = Unsqueeze.match(operand(reshaped.x))
    return wide.x if wide is not None and wide.dim == 2 and _rank(wide.x) == 4 else node


def _readers_are_known(cached: _Cached) -> bool:
    """Whether a joined cache is read by one attention, and by what asks for sizes or is returned."""
    return sum(user.op != "output" for user in readers(cached.joined)) == 1


def _replace(graph: Graph, scores: _Scores, values: _Cached, result: Node, mask: Node) -> None:
    keys = scores.keys
    inputs = (scores.query, keys.new, values.new, keys.past, values.past, mask)
    made = ops.cached_attention.default(*(node.meta["val"] for node in inputs), scores.factor, 0.0)
    with graph.inserting_before(result):
        fused = graph.call_function(ops.cached_attention.default, (*inputs, scores.factor, 0.0))
        fused.meta = {**result.meta, "val": made}
        parts = [graph.call_function(operator.getitem, (fused, place)) for place in range(3)]
        for part, value in zip(parts, made, strict=True):
            part.meta = {**result.meta, "val": value}
        turned = graph.call_function(aten.transpose.int, (parts[0], 1, 2))
        turned.meta = dict(result.meta)
    for user in list(result.users):
        if _swaps_heads(user):
            user.replace_all_uses_with(parts[0])
    result.replace_all_uses_with(turned)
    for cached, present in ((keys, parts[1]), (values, parts[2])):
        _let_go(cached, present, scores.mask)


def _swaps_heads(node: Node) -> bool:
    if is_call(node, aten.permute.default):
        return [axis % 4 for axis in bind(node).dims] == [0, 2, 1, 3]
    turned = Transpose.match(node)
    return turned is not None and {turned.dim0 % 4, turned.dim1 % 4} == {1, 2}


def _let_go(cached: _Cached, present: Node, mask: Node) -> None:
    """What returns a joined cache returns the attention's; its sizes are those of the past and the mask."""
    for user in list(cached.joined.users):
        if user.op == "output":
            user.replace_input_with(cached.joined, present)
        elif is_call(user, aten.sym_size.int):
            axis = bind(user).dim % 4
            user.args = (mask, 3) if axis == 2 else (cached.past, axis)
