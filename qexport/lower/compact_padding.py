"""Real tokens first in every row while the layers run, and the caller's order again behind them."""

import operator
from collections.abc import Collection, Iterator, Mapping

import torch
from torch.fx import Node

from ..artifact.cache_names import TOKEN_IDS, is_past
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import TensorSpec, call, shape_of
from ..graph.meta import Meta
from .block_io import first_call, hand_on, names_of, read_in
from .row_places import Read, turn_places

aten = torch.ops.aten
ops = torch.ops.qexport
_TURNED = "tokens."
LAST, TOTAL = f"{_TURNED}last", f"{_TURNED}total"  # what attention asks for, see ops.real_first
_BACK, _VALID = f"{_TURNED}back", f"{_TURNED}valid"


def turn_tokens(
    first: Block, values: dict[str, str], later: Mapping[str, TensorSpec], placed: Collection[Read]
) -> None:
    """Real tokens first in everything that the first block reads by position, and what later blocks need for it.

    Args:
        values: the names of the model's inputs in the graph, by their public names.
        later: what blocks behind it read from outside, by these names in the graph.
        placed: what it reads by place in the row.
    """
    graph = first.module.graph
    for name in turned_inputs(values):
        if (spec := later.get(values[name])) is not None:
            read_in(first, values[name], spec)
    by_name = {name: node for node, name in names_of(first).items()}
    start = first_call(graph)
    mask, ids = by_name[values["attention_mask"]], rows_of(first, values)
    order, batch = ids.meta[Meta.SPEC], shape_of(ids)[0]
    valid, last, total = (
        TensorSpec(torch.bool, (batch, 1, 1)),
        TensorSpec(torch.int32, (batch,)),
        TensorSpec(torch.int32, (1,)),
    )
    specs = (order, order, valid, last, total)
    with graph.inserting_before(start):
        found = call(graph, ops.real_first.default, (mask, ids), like=ids)
        found.meta[Meta.SPEC] = specs
        parts = [call(graph, operator.getitem, (found, i), like=ids) for i in range(len(specs))]
        for part, spec in zip(parts, specs, strict=True):
            part.meta[Meta.SPEC] = spec
        handed_on = dict(zip((_BACK, _VALID, LAST, TOTAL), parts[1:], strict=True))
        for name in turned_inputs(values):
            if (node := by_name.get(values[name])) is not None:
                reader, turned = _turned(node, parts[0], of_rows=name == "position_ids")
                _replace(node, turned, but={found, ids, reader})
                handed_on[turned_name(name)] = turned
    turn_places(placed, ids, parts[0])
    for name, node in handed_on.items():
        hand_on(first, node, name)


def _turned(node: Node, order: Node, *, of_rows: bool) -> tuple[Node, Node]:
    """A value with its tokens in another order, and the first node that makes it.

    Args:
        of_rows: its last axes are [batch, sequence]; otherwise its first ones are.
    """
    graph, shape = node.graph, shape_of(node)
    if not of_rows or len(shape) == 2:
        turned = call(graph, ops.take_tokens.default, (node, order), like=node)
        return turned, turned
    first = call(graph, aten.permute.default, (node, [1, 2, 0]), like=node, shape=(*shape[1:], shape[0]))
    taken = call(graph, ops.take_tokens.default, (first, order), like=first)
    return first, call(graph, aten.permute.default, (taken, [2, 0, 1]), like=node)


def turned_inputs(values: Mapping[str, str]) -> Iterator[str]:
    """The inputs of a decoder that are read by position, of those in `values`, by their public names."""
    return (name for name in values if name != "attention_mask" and not is_past(name))


def rows_of(first: Block, values: Mapping[str, str]) -> Node:
    """A value [batch, sequence] of the new tokens, whose shape alone counts: ids or, where it reads none, positions."""
    by_name = {name: node for node, name in names_of(first).items()}
    if TOKEN_IDS in values:
        return by_name[values[TOKEN_IDS]]
    node = by_name[values["position_ids"]]
    if len(shape_of(node)) == 2:
        return node
    graph = first.module.graph
    with graph.inserting_before(first_call(graph)):
        return call(graph, aten.select.int, (node, 0, 0), like=node, shape=shape_of(node)[1:])


def turned_name(name: str) -> str:
    """The value that blocks after the first read instead of an input of the model."""
    return f"{_TURNED}{name}"


def is_turned(value: str) -> bool:
    """Whether a value is an input of the model in another order, or what belongs to that order."""
    return value.startswith(_TURNED)


def turn_back(last: Block, captured: CapturedModel) -> None:
    """Tokens in the caller's order in what the last block reads of the layers; NaN in rows that are padded wrongly."""
    graph, names = last.module.graph, names_of(last)
    inputs = {port.value for port in captured.inputs}
    states = [
        node
        for node, name in names.items()
        if name not in inputs and node.meta[Meta.SPEC].dtype.is_floating_point and len(shape_of(node)) == 3
    ]
    batch, sequence = shape_of(states[0])[:2]
    back = read_in(last, _BACK, TensorSpec(torch.int64, (batch, sequence)))
    valid = read_in(last, _VALID, TensorSpec(torch.bool, (batch, 1, 1)))
    for node in states:
        with graph.inserting_before(first_call(graph)):
            turned = call(graph, ops.take_tokens.default, (node, back), like=node)
            marked = call(graph, aten.where.ScalarOther, (valid, turned, float("nan")), like=node)
        _replace(node, marked, but={turned})


def _replace(node: Node, other: Node, but: set[Node]) -> None:
    """Let everything that reads a value read another one, `but` these."""
    node.replace_all_uses_with(other, delete_user_cb=lambda user: user not in but)
