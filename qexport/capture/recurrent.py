"""Recurrent layers of torch.nn as one node each: PyTorch traces them step by step, for one length alone."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import _VF, Tensor

from ..errors import CaptureError

ops = torch.ops.qexport


@contextmanager
def layers_as_nodes():
    """What torch.nn.LSTM, GRU and RNN call inside is a node of the graph."""
    calls = {name: _of_one_state(name) for name in ("gru", "rnn_tanh", "rnn_relu")} | {"lstm": _lstm}
    cells = {name: getattr(_VF, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")}
    with patch.object(torch.nn.modules.rnn, "_VF", SimpleNamespace(**calls, **cells)):
        yield


def _lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    _check(hx, params, 2, has_biases, num_layers, bidirectional)
    return ops.lstm(input, list(hx), list(params), has_biases, num_layers, bidirectional, batch_first)


def _of_one_state(kind: str):
    def call(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        _check(hx, params, 1, has_biases, num_layers, bidirectional)
        return ops.recurrent(input, hx, list(params), has_biases, num_layers, bidirectional, batch_first, kind)

    return call


def _check(hx, params, states: int, has_biases: bool, num_layers: int, bidirectional: bool) -> None:
    if isinstance(hx, Tensor) == (states == 2) or not isinstance(params, list):
        raise CaptureError(
            "a recurrent layer reads a packed sequence, which is no tensor that a file could take",
            remedy="Pass padded sequences, and pick what counts from the result",
        )
    if len(params) != num_layers * (2 if bidirectional else 1) * (4 if has_biases else 2):
        raise CaptureError(
            "an LSTM has projections, which ONNX's does not have", remedy="Export it without proj_size, and a linear"
        )
