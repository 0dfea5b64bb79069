"""Recurrent networks: files compute what PyTorch computes, for every batch and length, and hand their states on."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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


@pytest.mark.by_default("lstm both ways", "lstm without biases", "gru", "rnn of relus")
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


def quantized(tmp_path, model, inputs, axes, recipe, calibration=()):
    """An export, and what its graph gives in PyTorch and its file in ONNX Runtime, of inputs."""
    captured = capture_model(model, inputs, axes)
    made = exports.export(captured, recipe, "cpu", tmp_path / "out", calibration=calibration or [inputs])
    return made, made.in_pytorch(), made.in_onnxruntime()


def sequences(rows, steps, states=1, hidden=256):
    random = torch.Generator().manual_seed(rows)
    first = [torch.tanh(torch.randn(states, rows, hidden, generator=random)) for _ in range(2)]
    return {"x": torch.randn(steps, rows, 6, generator=random), "state": first[0], "cell": first[1]}


AXES = {"x": {0: "steps", 1: "batch"}, "state": {1: "batch"}, "cell": {1: "batch"}}


class Wide(Streams):
    def __init__(self, kind, **options):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.linear, self.net = nn.Linear(6, 32), kind(32, 256, **options)


@pytest.mark.by_default("LSTM-options2-*", "GRU-options1-*")
@pytest.mark.parametrize(
    ("kind", "options", "scheme", "close"),
    [
        (nn.LSTM, {}, "w8a8_dyn", 0.01), (nn.GRU, {"bidirectional": True}, "w8a8_dyn", 0.02),
        (nn.LSTM, {"bidirectional": True}, "w8a8_static", 0.03), (nn.RNN, {}, "w4a16_g32", 0.2),
        pytest.param(nn.RNN, {"nonlinearity": "relu"}, "w8a16_g32", 0.05, marks=pytest.mark.slow),
        pytest.param(nn.LSTM, {"num_layers": 2, "bias": False}, "w8a8_static", 0.03, marks=pytest.mark.slow),
        pytest.param(nn.GRU, {"num_layers": 2}, "w4a16_g32_asym", 0.2, marks=pytest.mark.slow),
        pytest.param(nn.GRU, {}, "w8a8_static", 0.03, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_quantized_layers_agree_in_both_and_with_the_float_ones(tmp_path, kind, options, scheme, close):
    model = Wide(kind, **options).eval()
    states = model.net.num_layers * (2 if model.net.bidirectional else 1)
    made, graph, file = quantized(tmp_path, model, sequences(2, 4, states), AXES, Recipe(scheme=scheme))
    names = [entry.name for entry in made.manifest.linears if entry.name.startswith("net.")]
    assert names == [f"net.ih_l{i // 2}_reverse" if model.net.bidirectional and i % 2 else
                     f"net.ih_l{i // 2 if model.net.bidirectional else i}" for i in range(states)]  # fmt: skip
    for fed in (sequences(2, 4, states), sequences(3, 7, states)):
        want, found = graph(fed), file(fed)
        with torch.no_grad():
            plain = model(**fed)
        for index, value in enumerate(plain[: 3 if kind is nn.LSTM else 2]):
            own, got = want[f"output_{index}"], found[f"output_{index}"]
            # A value beside the edge of a code may fall to the other side of it, in one of the two.
            assert torch.nn.functional.cosine_similarity(own.flatten(), got.flatten(), dim=0) > 1 - 1e-5
            assert (value - got).pow(2).mean().sqrt() < close * value.pow(2).mean().sqrt()


@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w8a8_static"])
def test_neither_later_steps_nor_other_rows_change_a_sequence(tmp_path, scheme):
    model, whole = Wide(nn.LSTM).eval(), sequences(2, 6)
    _, _, run = quantized(tmp_path, model, sequences(2, 4), AXES, Recipe(scheme=scheme))
    calm = run(whole)
    loud = {**whole, "x": whole["x"].clone()}
    loud["x"][3:] *= 50
    loud["x"][:, 1] *= 50
    assert torch.equal(run(loud)["output_0"][:3, 0], calm["output_0"][:3, 0])
    parts, state, cell = [], whole["state"], whole["cell"]
    for step in whole["x"].split(2):
        made = run({"x": step, "state": state, "cell": cell})
        state, cell = made["output_1"], made["output_2"]
        parts.append(made["output_0"])
    assert torch.allclose(torch.cat(parts), calm["output_0"], atol=1e-6)


class Cells(nn.Module):
    """Cells in a loop over steps whose number is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LSTMCell(8, 32), nn.GRUCell(32, 32)

    def forward(self, x):
        hidden = cell = state = x.new_zeros(x.shape[0], 32)
        for step in x.unbind(1):
            hidden, cell = self.first(step, (hidden, cell))
            state = self.second(hidden, state)
        return state


@pytest.mark.slow
def test_cells_have_one_set_of_codes_for_all_steps(tmp_path):
    model, fed = Cells().eval(), {"x": torch.randn(4, 3, 8)}
    made, graph, file = quantized(tmp_path, model, fed, {"x": {0: "batch"}}, Recipe(scheme="w8a8_dyn"))
    names = {"first.ih", "first.hh", "second.ih", "second.hh"}
    assert {entry.name for entry in made.manifest.linears if not entry.reason} == names
    assert {entry.name for entry in made.manifest.linears} == {f"{n}{use}" for n in names for use in ("", "@2", "@3")}
    want, found = graph(fed)["output"], file(fed)["output"]
    assert torch.allclose(want, found, atol=1e-5)
    assert torch.allclose(model(**fed), found, atol=0.02)


class Packed(nn.Module):
    """A network over sequences of different lengths."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = kind(6, options.pop("hidden", 5), batch_first=True, **options)
        self.sorted = True

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sorted)
        out, states = self.net(packed)
        out, _ = pad_packed_sequence(out, batch_first=True, padding_value=-1.0)
        return (out, *states) if isinstance(states, tuple) else (out, states)


@pytest.mark.by_default("False-LSTM-options0-float")
@pytest.mark.parametrize(
    ("kind", "options", "scheme"),
    [
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}, "float"), (nn.GRU, {"hidden": 256}, "w8a8_dyn"),
        pytest.param(nn.GRU, {"bidirectional": True}, "float", marks=pytest.mark.slow),
        pytest.param(nn.LSTM, {"hidden": 32, "bidirectional": True}, "w8a8_static", marks=pytest.mark.slow),
        pytest.param(nn.RNN, {}, "float", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_are_padded_ones_and_lengths(tmp_path, kind, options, scheme, in_order):
    model = Packed(kind, **options).eval()
    model.sorted = in_order
    fed = {"x": torch.randn(3, 7, 6), "lengths": torch.tensor([7, 4, 1] if in_order else [4, 7, 1])}
    recipe = FLOAT if scheme == "float" else Recipe(scheme=scheme)
    axes = {"x": {0: "batch", 1: "steps"}, "lengths": {0: "batch"}}
    _, graph, file = quantized(tmp_path, model, fed, axes, recipe)
    with torch.no_grad():
        plain = model(**fed)
    want, found = graph(fed), file(fed)
    near, far = (1e-5, 1e-5) if scheme == "float" else (0.02, 0.1)
    for index, value in enumerate(plain):
        assert torch.allclose(want[f"output_{index}"], found[f"output_{index}"], atol=near)
        assert torch.allclose(value, found[f"output_{index}"], atol=far)


def test_small_layers_and_other_targets_say_why_they_stay_float():
    model = Streams(nn.LSTM).eval()
    given = {"x": torch.randn(4, 2, 6), "state": torch.randn(1, 2, 5), "cell": torch.randn(1, 2, 5)}
    for target, scheme, why in (
        ("cpu", "w8a8_dyn", "steps of less than 256 states are faster in float, and w8a8_static is faster"),
        ("cuda", "w8a8_dyn", "recurrent layers are float on this target"),
        ("cpu", "w8a8_static", ""),
    ):
        found = qexport.inspect(model, scheme, example_inputs=given, dynamic_shapes=AXES, target=target)
        (line,) = [linear for linear in found.linears if linear.name == "net.ih_l0"]
        assert line.reason == why


def test_the_report_says_what_is_inside_of_one_operator(tmp_path):
    model, fed = Wide(nn.LSTM).eval(), sequences(2, 4)
    qexport.export(
        model, "w8a8_static", out_dir=tmp_path / "out", example_inputs=fed, dynamic_shapes=AXES, calibration=[fed]
    )
    report = qexport.validate(tmp_path / "out", model, inputs=[fed])
    assert report.placement.kernels == {"MatMulIntegerToFloat": 1, "DynamicQuantizeLSTM": 1}
    assert not report.placement.unfused
    assert any("1 linear is inside DynamicQuantizeLSTM" in line for line in report.verdict)


def test_projections_are_refused():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 5, proj_size=3)).eval(), torch.randn(4, 2, 6)
    with pytest.raises(CaptureError, match="an LSTM has projections"):
        qexport.inspect(model, "w8a16_g32", example_inputs=(x,))
