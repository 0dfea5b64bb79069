"""Recurrent networks: files compute what PyTorch computes, for every batch and length, and hand their states on."""

import pytest
import torch
from torch import nn

import qexport
from helpers import exports
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError
from qexport.recipe.recipe import Recipe

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
KINDS = {
    "lstm": dict(kind=nn.LSTM), "lstm both ways": dict(kind=nn.LSTM, num_layers=2, bidirectional=True),
    "lstm without biases": dict(kind=nn.LSTM, bias=False, batch_first=True), "gru": dict(kind=nn.GRU, batch_first=True),
    "gru both ways": dict(kind=nn.GRU, num_layers=2, bidirectional=True), "rnn": dict(kind=nn.RNN, bidirectional=True),
    "rnn of relus": dict(kind=nn.RNN, nonlinearity="relu", batch_first=True),
}  # fmt: skip


class Streams(nn.Module):
    """A linear, and a recurrent network that goes on from given states and returns those behind."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.net = nn.Linear(6, 8), kind(8, 5, **options)

    def forward(self, x, state, cell):
        out, states = self.net(self.linear(x), (state, cell) if isinstance(self.net, nn.LSTM) else state)
        return (out, *states) if isinstance(states, tuple) else (out, states, cell * 1)


@pytest.mark.parametrize("name", KINDS)
def test_onnxruntime_computes_what_the_network_computes(tmp_path, name):
    model = Streams(**KINDS[name]).eval()
    batch = 0 if model.net.batch_first else 1

    def inputs(rows, steps):
        random = torch.Generator().manual_seed(rows)
        states = model.net.num_layers * (2 if model.net.bidirectional else 1)
        shape = (rows, steps, 6) if batch == 0 else (steps, rows, 6)
        first = [torch.randn(states, rows, 5, generator=random) for _ in range(2)]
        return {"x": torch.randn(*shape, generator=random), "state": first[0], "cell": first[1]}

    axes = {"x": {batch: "batch", 1 - batch: "steps"}, "state": {1: "batch"}, "cell": {1: "batch"}}
    made = exports.export(capture_model(model, inputs(2, 4), axes), FLOAT, "cpu", tmp_path / "out")
    run = made.in_onnxruntime()
    for fed in (inputs(2, 4), inputs(3, 9), inputs(1, 1)):
        with torch.no_grad():
            want = model(**fed)
        got = run(fed)
        assert all(torch.allclose(got[f"output_{i}"], value, atol=2e-6) for i, value in enumerate(want))


def test_projections_are_refused():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 5, proj_size=3)).eval(), torch.randn(4, 2, 6)
    with pytest.raises(CaptureError, match="an LSTM has projections"):
        qexport.inspect(model, "w8a16_g32", example_inputs=(x,))
