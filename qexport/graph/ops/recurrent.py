"""Recurrent networks over whole sequences, which PyTorch would trace step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


@torch.library.custom_op("qexport::lstm", mutates_args=())
def lstm(
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All layers of an LSTM, as torch.nn.LSTM computes them without dropout.

    Args:
        input: [steps, batch, features], or [batch, steps, features] with batch_first.
        hx: the first states, hidden and cell, [layers * directions, batch, hidden].
        params: of each layer and direction: weights of the input and of the state, and their biases where it has them.

    Returns:
        the states of the last layer for every step, and the last states of every layer.
    """
    return _run(
        aten.lstm.input, input, list(hx), params, has_biases, num_layers, bidirectional, batch_first
    )  # fmt: skip


@lstm.register_fake
def _(input, hx, params, has_biases, num_layers, bidirectional, batch_first):
    return _outputs(input, hx[0], bidirectional), torch.empty_like(hx[0]), torch.empty_like(hx[1])


@torch.library.custom_op("qexport::recurrent", mutates_args=())
def recurrent(
    input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool,
    batch_first: bool, kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of a network with one state: "gru", "rnn_tanh" or "rnn_relu"."""
    run = {"gru": aten.gru.input, "rnn_tanh": aten.rnn_tanh.input, "rnn_relu": aten.rnn_relu.input}[kind]
    return _run(run, input, hx, params, has_biases, num_layers, bidirectional, batch_first)


@recurrent.register_fake
def _(input, hx, params, has_biases, num_layers, bidirectional, batch_first, kind):
    return _outputs(input, hx, bidirectional), torch.empty_like(hx)


def _run(run, input, hx, params, has_biases, num_layers, bidirectional, batch_first):
    found = run(input, hx, list(params), has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    return tuple(value.clone(memory_format=torch.contiguous_format) for value in found)


def _outputs(input: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    return input.new_empty((*input.shape[:2], state.shape[2] * (2 if bidirectional else 1)))
