"""Recurrent layers of torch.nn as a linear and the node of its steps each: PyTorch traces them step by step."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import _VF, Tensor
from torch.fx import Graph
from torch.nn.utils import rnn as utils

from ..errors import CaptureError
from ..graph.meta import Meta
from ..graph.views import LinearCall, RecurrentSteps, tensor_name

ops = torch.ops.qexport


@dataclass(frozen=True)
class _Padded:
    """A padded sequence and how long its rows are, in the place of a packed one, which is no tensor of a file.

    Attributes:
        data: [steps, batch, features].
        batch_sizes: how long the rows are.
        sorted_indices, unsorted_indices: the order of rows and the way back; None where they are as they were.
    """

    data: Tensor
    batch_sizes: "_Lengths"
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None


@dataclass(frozen=True)
class _Lengths:
    """The lengths [batch] of rows of so many steps."""

    lengths: Tensor
    steps: int

    def size(self, axis: int) -> int:
        """What `pad_packed_sequence` asks of the batch sizes of a packed sequence: the number of steps."""
        return self.steps


@contextmanager
def layers_as_nodes():
    """What torch.nn.LSTM, GRU and RNN call inside are nodes of the graph, packed sequences padded ones."""
    calls = {name: _of_one_state(name) for name in ("gru", "rnn_tanh", "rnn_relu")} | {"lstm": _lstm}
    cells = {name: getattr(_VF, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")}
    layers = torch.nn.modules.rnn
    with ExitStack() as patches:
        for owner, name, value in (
            (layers, "_VF", SimpleNamespace(**calls, **cells)),
            (utils, "_VF", SimpleNamespace(_pack_padded_sequence=_pack, _pad_packed_sequence=_pad)),
            (utils, "_packed_sequence_init", _init),
            *((kind, "forward", _forward(kind)) for kind in (layers.LSTM, layers.GRU, layers.RNN)),
        ):
            patches.enter_context(patch.object(owner, name, value))
        yield


def name_gates(graph: Graph) -> None:
    """Name the linears of recurrent layers and cells: their weights belong to one module, and would go by its name."""
    for node in graph.nodes:
        linear = LinearCall.match(node)
        if linear is None or linear.weight.op != "get_attr":
            continue
        owner, _, leaf = tensor_name(linear.weight).rpartition(".")
        if leaf.startswith(("weight_ih", "weight_hh")):
            node.meta[Meta.NAMED] = f"{owner or 'root'}.{leaf.removeprefix('weight_')}"
    for node in graph.nodes:
        steps = RecurrentSteps.match(node)
        if steps is not None and Meta.NAMED in steps.gates.meta:
            node.meta[Meta.GATES] = steps.gates.meta[Meta.NAMED]


def _pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, _Lengths]:
    x = input.transpose(0, 1) if batch_first else input
    return x, _Lengths(lengths.to(x.device), x.shape[0])


def _init(data, batch_sizes, sorted_indices=None, unsorted_indices=None):
    if sorted_indices is not None and unsorted_indices is None:
        unsorted_indices = utils.invert_permutation(sorted_indices)
    return _Padded(data, batch_sizes, sorted_indices, unsorted_indices)


def _pad(data: Tensor, sizes: _Lengths, batch_first: bool, value: float, steps: int) -> tuple[Tensor, Tensor]:
    """What counts, `value` behind it; as many steps as went in, while PyTorch keeps those of the longest row."""
    within = (torch.arange(data.shape[0], device=data.device)[:, None] < sizes.lengths)[..., None]
    data = torch.where(within, data, torch.full_like(data, value))
    return data.transpose(0, 1) if batch_first else data, sizes.lengths


def _forward(kind: type[torch.nn.RNNBase]) -> Callable[..., Any]:
    """The forward of a kind of layer that takes a padded sequence with lengths too."""
    plain = kind.forward

    def forward(self, input, hx=None):
        if isinstance(input, utils.PackedSequence):
            raise CaptureError(
                "a recurrent layer reads a packed sequence, which cannot be the input of a file",
                remedy="Pack it in forward, from padded tensors",
            )
        if not isinstance(input, _Padded):
            return plain(self, input, hx)
        mode, x, order, back = self.mode.lower(), input.data, input.sorted_indices, input.unsorted_indices
        params = [getattr(self, name) for name in self._flat_weights_names]  # as torch.export has them while it traces
        _check(mode, params, self.bias, self.num_layers, self.bidirectional)
        zeros = x.new_zeros(self.num_layers * (2 if self.bidirectional else 1), x.shape[1], self.hidden_size)
        given = [hx] if isinstance(hx, Tensor) else list(hx or [zeros] * (2 if mode == "lstm" else 1))
        first = given if order is None or hx is None else [state.index_select(1, order) for state in given]
        lengths = input.batch_sizes.lengths
        out, last = _layers(x, first, params, self.bias, self.num_layers, self.bidirectional, mode, lengths)
        last = last if back is None else tuple(state.index_select(1, back) for state in last)
        return replace(input, data=out), last if len(last) > 1 else last[0]

    return forward


def _lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    _check("lstm", params, has_biases, num_layers, bidirectional)
    return _batched(input, list(hx), params, has_biases, num_layers, bidirectional, batch_first, "lstm")


def _of_one_state(kind: str):
    def call(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        _check(kind, params, has_biases, num_layers, bidirectional)
        return _batched(input, [hx], params, has_biases, num_layers, bidirectional, batch_first, kind)

    return call


def _check(kind: str, params, has_biases: bool, num_layers: int, bidirectional: bool) -> None:
    if len(params) != num_layers * (2 if bidirectional else 1) * (4 if has_biases else 2):
        raise CaptureError(
            "an LSTM has projections, which ONNX's LSTM lacks", remedy="Replace proj_size by a linear"
        )


def _batched(
    input: Tensor, first: list[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool, kind: str,
):  # fmt: skip
    x = input.transpose(0, 1) if batch_first else input
    out, last = _layers(x, first, params, has_biases, num_layers, bidirectional, kind)
    return out.transpose(0, 1) if batch_first else out, *last


def _layers(
    x: Tensor, first: list[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool,
    kind: str, lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """All layers, one behind the other.

    Args:
        x: [steps, batch, features].
        first: states, [layers * directions, batch, hidden] each.
        params: of each layer and direction: weights of the input and of the state, and their biases where it has them.
        lengths: [batch]; None: all steps count.

    Returns:
        what the last layer gives, and the last states of all.
    """
    directions, parts = 2 if bidirectional else 1, 4 if has_biases else 2
    last: list[list[Tensor]] = [[] for _ in first]
    for layer in range(num_layers):
        made = []
        for direction in range(directions):
            place = layer * directions + direction
            into, within, *biases = params[place * parts : (place + 1) * parts]
            bias_in, bias_within = biases or (None, None)
            gates = torch.nn.functional.linear(x, into, bias_in)
            states = [state[place] for state in first]
            cell = states[1] if len(states) > 1 else None
            out, *ends = ops.recurrent_steps(
                gates, states[0], cell, within, bias_within, lengths, direction == 1, kind
            )  # fmt: skip
            made.append(out)
            for found, end in zip(last, ends, strict=False):
                found.append(end)
        x = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
    return x, tuple(torch.stack(found) for found in last)
