"""Logits of the last token of a sequence only: all that generation reads, and less work for a prompt."""

from dataclasses import replace

import torch
from torch.fx import Node

from ..capture.graph import CapturedModel
from ..errors import InputError, LoweringError
from ..graph.edit import TensorSpec, call, finish, shape_of
from ..graph.meta import Meta
from ..graph.sites import projection_behind
from ..graph.views import END, results_of

aten = torch.ops.aten


def read_by_projection(captured: CapturedModel) -> str:
    """Name of the value [batch, sequence, features] that the output projection reads in the float graph.

    Raises:
        InputError: the model has no logits, or they do not come straight from a linear.
    """
    found = captured.output_node("logits")
    if found is None or captured.kind == "encoder":
        raise InputError(
            "this model makes no logits of the token that comes next",
            place="logits",
            remedy="Export it with logits all",
        )
    projection = projection_behind(found[1])
    if projection is None or len(shape_of(projection.input)) != 3:
        raise InputError(
            "the logits of this model do not come straight from a linear on every token", place="logits",
            remedy="Export it with logits all",
        )  # fmt: skip
    return projection.input.name


def keep_last(captured: CapturedModel, value: str) -> None:
    """Cut the sequence to its last token in front of the output projection, in place, in quantized blocks too.

    What the projection reads is cut before it is quantized and before branches beside the projection read it.

    Args:
        value: name of the value; see `read_by_projection`.

    Raises:
        LoweringError: a pass took the value away, or something else than the logits depends on it.
    """
    if (made := captured.output_node("logits")) is None:
        raise TypeError("this model makes no logits")
    block, logits = made
    graph, results = block.module.graph, results_of(block.module.graph)
    hidden = next((node for node in graph.nodes if node.name == value), None)
    behind = _descendants(hidden) if hidden is not None else set()
    if hidden is None or logits not in behind or any(r in behind or r is hidden for r in results if r is not logits):
        raise LoweringError(
            f"{value}, which the output projection read, no longer leads to the logits and nothing else",
            place=block.name, remedy="Export with logits all",
        )  # fmt: skip
    batch, length, features = shape_of(hidden)
    with graph.inserting_before(min(hidden.users)):
        last = call(graph, aten.slice.Tensor, (hidden, 1, -1, END), like=hidden, shape=(batch, 1, features))
    hidden.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    for node in behind:
        if isinstance(spec := node.meta.get(Meta.SPEC), TensorSpec):
            node.meta[Meta.SPEC] = replace(spec, shape=tuple(1 if d == length else d for d in spec.shape))
    finish(block.module)
    captured.outputs = [
        replace(port, dims=(port.dims[0], 1, *port.dims[2:])) if port.name == "logits" else port
        for port in captured.outputs
    ]


def _descendants(node: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user.op != "output" and user not in found:
                found.add(user)
                todo.append(user)
    return found
