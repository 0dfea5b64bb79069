"""Recurrent networks over whole sequences: one node for each layer, its states in and out."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ..emitter import Emitter
from ..registry import translates

ops = torch.ops.qexport


@dataclass(frozen=True)
class _Kind:
    """A recurrent operator of ONNX.

    Attributes:
        op_type: its name; states: how many tensors it hands from step to step.
        order: of the gates of PyTorch's weights, as the operator wants them.
        activations: of one direction; empty for those that it takes of itself.
    """

    op_type: str
    states: int
    order: tuple[int, ...]
    activations: tuple[str, ...] = ()


_LSTM = _Kind("LSTM", 2, (0, 3, 1, 2))
_OF_ONE_STATE = {
    "gru": _Kind("GRU", 1, (1, 0, 2)),
    "rnn_tanh": _Kind("RNN", 1, (0,), ("Tanh",)),
    "rnn_relu": _Kind("RNN", 1, (0,), ("Relu",)),
}


@translates(ops.lstm.default)
def _lstm(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _layers(emit, given, _LSTM, given.hx)


@translates(ops.recurrent.default)
def _recurrent(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _layers(emit, given, _OF_ONE_STATE[given.kind], [given.hx])


def _layers(emit: Emitter, given: Arguments, kind: _Kind, states: Sequence[Node]) -> tuple[ir.Value, ...]:
    """All layers one behind the other: what the last one gives, and the last states of each."""
    directions, parts = 2 if given.bidirectional else 1, 4 if given.has_biases else 2
    x = emit.get(given.input)
    x = emit.op("Transpose", x, perm=[1, 0, 2]) if given.batch_first else x
    ends: list[list[ir.Value]] = [[] for _ in states]
    for layer in range(given.num_layers):
        at = layer * directions
        begin, stop = emit.constant([at]), emit.constant([at + directions])
        first = [emit.op("Slice", emit.get(state), begin, stop, emit.constant([0])) for state in states]
        params = given.params[at * parts : (at + directions) * parts]
        x, *last = _layer(emit, x, first, [params[i : i + parts] for i in range(0, len(params), parts)], kind)
        for found, end in zip(ends, last, strict=True):
            found.append(end)
    x = emit.op("Transpose", x, perm=[1, 0, 2]) if given.batch_first else x
    return x, *(found[0] if len(found) == 1 else emit.op("Concat", *found, axis=0) for found in ends)


def _layer(
    emit: Emitter, x: ir.Value, first: Sequence[ir.Value], directions: Sequence[Sequence[Node]], kind: _Kind
) -> list[ir.Value]:
    """One layer of one direction or two: [steps, batch, directions * hidden], and its last states."""
    (into, within, *biases), dtype = directions[0], dtype_of(directions[0][0])
    hidden, width, gates = sizes_of(within)[1], sizes_of(into)[1], len(kind.order)

    def ordered(*weights: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat([weight.chunk(gates)[gate] for gate in kind.order]) for weight in weights])

    def both(*halves: torch.Tensor) -> torch.Tensor:
        """Biases of what comes in and of what is handed on, of each direction."""
        pairs = [torch.cat([ordered(a)[0], ordered(b)[0]]) for a, b in zip(halves[::2], halves[1::2], strict=True)]
        return torch.stack(pairs)

    many, rows = len(directions), gates * hidden
    weight_in, weight_within = (
        emit.derived(
            directions[0][place], "gates", [many, rows, size], dtype, ordered, *(d[place] for d in directions[1:])
        )
        for place, size in ((0, width), (1, hidden))
    )
    bias = None
    if biases:
        halves = [half for direction in directions for half in direction[2:]]
        bias = emit.derived(halves[0], "gates", [many, 2 * rows], dtype, both, *halves[1:])
    y, *last = emit.several(
        1 + kind.states, kind.op_type, x, weight_in, weight_within, bias, None, *first, hidden_size=hidden,
        direction="bidirectional" if many == 2 else "forward",
        linear_before_reset=1 if kind.op_type == "GRU" else None, more=_activations(kind, many),
    )  # fmt: skip
    y = emit.op("Transpose", y, perm=[0, 2, 1, 3])
    return [emit.op("Reshape", y, emit.constant([0, 0, many * hidden])), *last]


def _activations(kind: _Kind, directions: int) -> dict[str, list[str] | None]:
    return {"activations": list(kind.activations) * directions or None}
