"""Real tokens first in every row while the layers run, and the caller's order again behind them."""

import operator
from collections.abc import Mapping

import torch
from torch.fx import Node

from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import TensorSpec, call, shape_of
from ..graph.meta import Meta
from .block_io import first_call, hand_on, names_of, read_in

aten = torch.ops.aten
ops = torch.ops.qexport
LAST, TOTAL = "tokens.last", "tokens.total"  # what attention asks for, see ops.real_first
_BACK, _VALID = "tokens.back", "tokens.valid"


def turn_tokens(first: Block, values: dict[str, str], later: Mapping[str, TensorSpec]) -> None:
    """Real tokens first in everything that the first block reads by position, and what later blocks need for it.

    Args:
        values: the names of the model's inputs in the graph, by their public names.
        later: what blocks behind it read from outside, by these names in the graph.
    """
    graph = first.module.graph
    for name in ("input_ids", "position_ids"):
        if (spec := later.get(values[name])) is not None:
            read_in(first, values[name], spec)
    by_name = {name: node for node, name in names_of(first).items()}
    mask, ids = by_name[values["attention_mask"]], by_name[values["input_ids"]]
    order, batch = ids.meta[Meta.SPEC], shape_of(ids)[0]
    valid, last, total = (
        TensorSpec(torch.bool, (batch, 1, 1)),
        TensorSpec(torch.int32, (batch,)),
        TensorSpec(torch.int32, (1,)),
    )
    specs = (order, order, valid, last, total)
    with graph.inserting_before(first_call(graph)):
        found = call(graph, ops.real_first.default, (mask, ids), like=ids)
        found.meta[Meta.SPEC] = specs
        parts = [call(graph, operator.getitem, (found, i), like=ids) for i in range(len(specs))]
        for part, spec in zip(parts, specs, strict=True):
            part.meta[Meta.SPEC] = spec
        handed_on = dict(zip((_BACK, _VALID, LAST, TOTAL), parts[1:], strict=True))
        for name in ("input_ids", "position_ids"):
            if (node := by_name.get(values[name])) is not None:
                turned = call(graph, ops.take_tokens.default, (node, parts[0]), like=node)
                _replace(node, turned, but={found, turned})
                handed_on[turned_name(name)] = turned
    for name, node in handed_on.items():
        hand_on(first, node, name)


def turned_name(name: str) -> str:
    """The value that blocks after the first read instead of an input of the model."""
    return f"tokens.{name}"


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
