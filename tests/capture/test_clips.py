"""Every spelling of a clip is one operator after capture, computes the same, and ends the range of what it clips."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers import exports
from helpers.runners import captured_runner, load_weights
from qexport.api.validating import validate
from qexport.capture.module import capture_module

aten = torch.ops.aten


class Applied(nn.Module):
    """A function behind a linear."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function
        self.register_buffer("six", torch.tensor(6.0))

    def forward(self, x):
        x = self.linear(x)
        return self.function(x, self.six) if getattr(self.function, "__name__", "") == "by_buffer" else self.function(x)


def by_buffer(x, six):
    return torch.minimum(x.relu(), six)


ZERO_TO_SIX = {
    "relu6": functional.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "in place": nn.ReLU6(inplace=True),
    "hardtanh": nn.Hardtanh(0, 6),
    "clamp": lambda x: x.clamp(0, 6),
    "named": lambda x: torch.clamp(x, max=6, min=0),
    "clip": lambda x: torch.clip(x, 0, 6),
    "clamp_min, clamp_max": lambda x: x.clamp_min(0).clamp_max(6),
    "relu, clamp": lambda x: functional.relu(x).clamp(max=6.0),
    "wider ones in front": lambda x: x.clamp(-9, 7).clamp(max=6.5).relu().clamp(-1, 6),
    "minimum, maximum": lambda x: torch.minimum(torch.maximum(torch.tensor(0.0), x), torch.tensor(6.0)),
    "min, max of filled": lambda x: torch.min(torch.max(x, torch.zeros_like(x)), torch.full_like(x, 6.0)),
    "clamp by tensors": lambda x: torch.clamp(x, torch.tensor(0.0), torch.tensor(6.0)),
    "buffer": by_buffer,
}
OTHERS = {
    "hardtanh alone": (nn.Hardtanh(), [(aten.clamp.default, (-1.0, 1.0))]),
    "relu": (lambda x: torch.maximum(x, torch.zeros(())), [(aten.relu.default, ())]),
    "threshold": (nn.Threshold(0.0, 0.0), [(aten.relu.default, ())]),
    "low": (lambda x: x.clamp_min(-0.5), [(aten.clamp.default, (-0.5, None))]),
    "crossed": (lambda x: x.clamp(1, 2).clamp(3, 4), [(aten.clamp.default, (3.0, 3.0))]),
    "hardswish": (lambda x: x * functional.relu6(x + 3) / 6, [(aten.hardswish.default, ())]),
    "hardswish, sixths": (lambda x: x * (functional.relu6(x + 3) * (1 / 6)), [(aten.hardswish.default, ())]),
    "hardsigmoid": (lambda x: functional.hardtanh(x + 3, 0.0, 6.0) / 6, [(aten.hardsigmoid.default, ())]),
    "another slope": (lambda x: functional.relu6(x + 2) / 6, None),
    "a threshold with another value": (nn.Threshold(0.5, 0.1), None),
    "wider": (lambda x: torch.maximum(x[..., :1], torch.zeros(8)), None),
}


def captured(function):
    torch.manual_seed(0)
    model = Applied(function).eval()
    with torch.no_grad():
        model.linear.weight.mul_(8)
    return model, capture_module(model, {"x": torch.randn(3, 8)})


def check(model, found) -> list:
    """Whether graph and module agree; the calls behind the linear."""
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    calls = [n for block in found.blocks for n in block.module.graph.nodes if n.op == "call_function"]
    with torch.no_grad():
        want = model(x)
    got = captured_runner(load_weights(found))({"x": x})["output"]
    assert want.abs().max() > 1 or "threshold" in str(calls) or want.min() < want.max()
    assert torch.allclose(got, want, atol=1e-5)
    return [(n.target, tuple(n.args[1:])) for n in calls[1:]]


@pytest.mark.by_default("in place", "minimum, maximum", "clamp by tensors", "nn.ReLU6")
@pytest.mark.parametrize("name", ZERO_TO_SIX)
def test_every_spelling_of_relu6_is_one_clamp(name):
    assert check(*captured(ZERO_TO_SIX[name])) == [(aten.clamp.default, (0.0, 6.0))]


@pytest.mark.parametrize("name", [n for n, (_, calls) in OTHERS.items() if calls])
def test_other_clips(name):
    function, calls = OTHERS[name]
    assert check(*captured(function)) == calls


@pytest.mark.parametrize("name", ["another slope", "wider"])
def test_what_only_looks_alike_stays_what_it_computes(name):
    found = check(*captured(OTHERS[name][0]))
    assert not {target for target, _ in found} & {aten.hardsigmoid.default, aten.relu.default}


def test_a_clip_that_others_read_too_is_not_joined():
    assert len(check(*captured(lambda x: x.relu() + x.relu().clamp(max=1)))) >= 3


class Mobile(nn.Module):
    """Convolutions, each with a clip, in layers that have a block each."""

    def __init__(self, clip):
        super().__init__()
        widths = (3, 8, 16)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)])
            for i, o in zip(widths, widths[1:], strict=False)
        )
        self.head, self.clip = nn.Linear(16, 10), clip

    def forward(self, x):
        for conv, norm in self.layers:
            x = self.clip(norm(conv(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_static_ranges_end_where_any_clip_ends(all_convolutions, tmp_path):
    """Taken in front of it, the range of values up to 60 would leave a tenth of the codes to what is up to 6."""
    x, decibels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 20, {}
    for name in ("relu6", "nn.ReLU6", "minimum, maximum", "min, max of filled"):
        torch.manual_seed(0)
        model, out = Mobile(ZERO_TO_SIX[name]).eval(), tmp_path / name.replace(" ", "")
        exports.exporting.export(model, "w8a8_static", out_dir=out, example_inputs=(x,), calibration=[(x,)])
        report = validate(out, model, inputs=[(x,)])
        assert not report.problems and report.placement.convolutions == 2
        decibels[name] = report.outputs[0].sqnr_db
        operators = {node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node}
        assert "Clip" not in operators and "Relu" not in operators
    assert len(set(decibels.values())) == 1 and decibels["relu6"] > 30
