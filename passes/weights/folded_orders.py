"""Orders in which codes take input features, folded into the rows of the linears that make these features.

Codes in the order p read x[p]. Where x is made feature by feature, x = f(W x'), of linears alone, x[p] is f of the same
linears with their rows in that order: exact, and nothing is left to compute. A norm does not do: norm(x)[p] takes
x[p], and x is the residual stream, which other linears read in other orders. Nor does attention: a feature stays within
its head, and all query heads that share a head of values share its order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.edit import get_tensor, is_call, set_tensor, shape_of
from ...graph.sites import Linear, by_input, linear_at, linears, own_tensors, readers
from ...graph.views import Item, operand
from ...models.coded import Given

aten = torch.ops.aten
_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass
class FoldedOrders:
    """What became of the orders of a block.

    Attributes:
        given: codes by name of the linear: rows in another order where one was folded into them, and no order of
            columns any more where it was.
        results: by name, int64 [N]: which feature of the float model's result is in each place of the file's.
        inputs: the same of what a linear reads, where its order was folded.
        refused: by name, why an order was not.
    """

    given: dict[str, Given]
    results: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class _Refused(Exception):
    """Why an order cannot be folded, in words."""


def fold_orders(module: GraphModule, given: Mapping[str, Given]) -> FoldedOrders:
    """Fold what can be; biases of linears are reordered in the module.

    Args:
        module: with its linears still in float.
        given: the codes of its linears, by name.
    """
    done = FoldedOrders(dict(given))
    for value, found in by_input(linears(module.graph)).items():
        ordered = [linear for linear in found if (codes := given.get(linear.name)) and codes.order is not None]
        if not ordered:
            continue
        try:
            order = _one_order(value, found, done.given)
            rows = _rows_behind(value, done.given)
        except _Refused as why:
            done.refused |= {linear.name: str(why) for linear in ordered}
            continue
        for linear, places in rows.items():
            _reorder(module, linear, places, order, done)
        for linear in ordered:
            done.given[linear.name] = replace(done.given[linear.name], order=None)
            done.inputs[linear.name] = order
    return done


def _one_order(value: Node, found: list[Linear], given: Mapping[str, Given]) -> Tensor:
    """The order in which everything reads a value."""
    nodes = {linear.node for linear in found}
    if other := next((user for user in readers(value) if user not in nodes), None):
        raise _Refused(f"{other.name} reads the value too")
    orders = [codes.order if (codes := given.get(linear.name)) else None for linear in found]
    first = orders[0]
    if first is None or any(order is None or not torch.equal(order.features, first.features) for order in orders):
        raise _Refused("not all that read the value take it in this order")
    if next((linear for linear in found if given[linear.name].factor is not None), None):
        raise _Refused("the value is multiplied by factors first")
    return first.features


def _rows_behind(value: Node, given: Mapping[str, Given]) -> dict[Linear, list[Tensor]]:
    """The linears that a value is made of, feature by feature, with the rows that its features are of, [K] each."""
    seen, waiting, rows = set(), [value], dict[Linear, list[Tensor]]()
    while waiting:
        node = waiting.pop()
        if node in seen or not shape_of(node) or shape_of(node)[-1] == 1:  # the same for all features
            continue
        seen.add(node)
        if (part := _rows(node)) is not None:
            linear, places, between = part
            seen |= between
            _check(linear, given)
            rows.setdefault(linear, []).append(places)
        elif _by_feature(node):
            waiting += node.all_input_nodes
        else:
            raise _Refused(_what_makes(node))
    for node in seen - {value}:
        if other := next((user for user in readers(node) if user not in seen), None):
            made = linear_at(node)
            raise _Refused(f"{other.name} reads {made.name if made else node.name}, of which the value is made")
    return rows


def _by_feature(node: Node) -> bool:
    """Whether a node makes every feature of the same feature of its operands."""
    return is_call(node, *_CASTS) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _rows(node: Node) -> tuple[Linear, Tensor, set[Node]] | None:
    """The linear whose result, or a part of it, a value is: its rows, and the nodes between; None of other values."""
    steps = [node]
    while is_call(steps[-1], *_PARTS) or Item.match(steps[-1]) is not None:
        steps.append(operand(steps[-1]))
    *parts, source = steps
    if (linear := linear_at(source)) is None:
        return None
    # A part of features is the same part of their numbers.
    numbers = torch.arange(linear.shape[0]).reshape((1,) * (len(shape_of(source)) - 1) + (-1,))
    made = numbers
    for step in reversed(parts):
        made = step.target(made, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    return linear, made.flatten(), set(steps)


def _what_makes(node: Node) -> str:
    if Item.match(node) is not None or node.op != "call_function":
        return f"{node.name} is not made feature by feature"
    return f"{node.name} comes from {getattr(node.target, '__name__', node.target)}, not made feature by feature"


def _check(linear: Linear, given: Mapping[str, Given]) -> None:
    codes = given.get(linear.name)
    if codes is None:
        raise _Refused(f"{linear.name}, which makes it, keeps no codes")
    if not own_tensors(linear):
        raise _Refused(f"a tensor of {linear.name}, which makes it, is used elsewhere too")
    if len(codes.weight.scale) not in (1, linear.shape[0]):
        raise _Refused(f"{linear.name}, which makes it, has scales for several rows")


def _reorder(module: GraphModule, linear: Linear, places: list[Tensor], order: Tensor, done: FoldedOrders) -> None:
    """Put rows of a linear where the features of a value want them."""
    rows = torch.arange(linear.shape[0])
    for part in places:
        rows[part] = part[order]
    codes = done.given[linear.name]
    weight = codes.weight
    done.given[linear.name] = replace(
        codes,
        weight=replace(
            weight, codes=weight.codes[rows], scale=_rows_of(weight.scale, rows),
            zero_point=None if weight.zero_point is None else _rows_of(weight.zero_point, rows),
        ),
        offset=None if codes.offset is None else codes.offset[rows],
    )  # fmt: skip
    if linear.bias is not None:
        set_tensor(module, linear.bias, get_tensor(module, linear.bias)[rows])
    done.results[linear.name] = rows


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows] if len(tensor) > 1 else tensor
