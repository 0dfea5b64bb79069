"""Zeros that a model adds in front of a convolution are the convolution's own, quantized or not."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers import exports
from helpers.agreement import module_differences
from qexport.capture.module import capture_module
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import optimized_graph, unfused_convolutions

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])


class Padded(nn.Module):
    """Two convolutions with padding of their own and a function of the input of the second."""

    def __init__(self, pad, dims: int = 2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.first, self.second, self.pad = conv(3, 8, 3, padding=1), conv(8, 4, 3, stride=2, padding=(1,) * dims), pad

    def forward(self, x):
        return self.second(self.pad(self.first(x).relu()))


FOLDED = {
    "both sides": lambda x: functional.pad(x, (1, 1, 2, 2)),
    "ZeroPad2d": nn.ZeroPad2d((0, 1, 0, 1)),
    "ConstantPad2d": nn.ConstantPad2d((2, 0, 0, 3), 0.0),
    "one axis": lambda x: functional.pad(x, (2, 1)),
    "constant": lambda x: functional.pad(x, (1, 0, 1, 0), mode="constant", value=0),
}
KEPT = {
    "ones": lambda x: functional.pad(x, (1, 1), value=1.0),
    "reflected": lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "cropped": lambda x: functional.pad(x, (-1, 1)),
    "channels": lambda x: functional.pad(x[:, :7], (0, 0, 0, 0, 0, 1)),
    "read twice": lambda x: functional.pad(x, (0, 1)) if x is None else (lambda p: p + p.mean())(
        functional.pad(x, (0, 1))),
}  # fmt: skip


def made(pad, recipe, tmp_path, dims: int = 2):
    """An export, and its inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(12, 10)[:dims])
    model = Padded(pad, dims).eval()
    data = [{"x": x}] if recipe == "w8a8_static" else None
    given = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    found = exports.export(capture_module(model, {"x": x}), given, "cpu", tmp_path / "out", calibration=data)
    with torch.no_grad():
        return found, {"x": x}, model(x)


def operators(found) -> list[str]:
    return [node.op_type for node in onnx.load(found.folder / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("name", FOLDED)
def test_zeros_become_the_padding_of_an_integer_convolution(all_convolutions, tmp_path, name):
    found, feeds, want = made(FOLDED[name], "w8a8_static", tmp_path)
    assert "Pad" not in operators(found)
    graph = optimized_graph(found.folder, found.manifest)
    assert not unfused_convolutions(graph, found.manifest.convolutions)
    assert graph.op_counts()["QLinearConv"] == 2
    assert module_differences(found, feeds).max() < 2e-2
    got = found.in_onnxruntime()(feeds)["output"]
    assert got.shape == want.shape and (got - want).abs().max() < 0.04 * want.abs().max()


@pytest.mark.parametrize("name", FOLDED)
def test_zeros_become_the_padding_of_a_float_convolution(tmp_path, name):
    found, feeds, want = made(FOLDED[name], FLOAT, tmp_path)
    assert "Pad" not in operators(found)
    assert (found.in_onnxruntime()(feeds)["output"] - want).abs().max() < 1e-5


def test_causal_padding_in_one_dimension(tmp_path):
    found, feeds, want = made(nn.ConstantPad1d((2, 0), 0.0), "w8a8_static", tmp_path, dims=1)
    assert "Pad" not in operators(found)
    assert (found.in_onnxruntime()(feeds)["output"] - want).abs().max() < 0.04 * want.abs().max()


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("recipe", [FLOAT, "w8a8_static"], ids=["float", "w8a8_static"])
def test_other_padding_stays(all_convolutions, tmp_path, name, recipe):
    found, feeds, want = made(KEPT[name], recipe, tmp_path)
    assert "Pad" in operators(found)
    limit = 1e-5 if recipe is FLOAT else 0.05
    assert (found.in_onnxruntime()(feeds)["output"] - want).abs().max() < limit * want.abs().max()


class Sequence(nn.Module):
    """A sequence as an image of width 1, padded outside and inside of a convolution, as pitch trackers have it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 32, (15, 1), padding=(7, 0))
        self.second = nn.Conv2d(32, 32, (16, 1))

    def forward(self, x):
        return self.second(functional.pad(self.first(x).relu(), (0, 0, 7, 8)))


@pytest.mark.parametrize("length", [64, 6])
def test_long_sequences_of_width_1_are_padded_in_front_of_float_convolutions(tmp_path, length):
    torch.manual_seed(0)
    model, x = Sequence().eval(), torch.randn(2, 16, length, 1)
    found = exports.export(capture_module(model, {"x": x}), FLOAT, "cpu", tmp_path / "out")
    kinds = optimized_graph(found.folder, found.manifest).op_counts()
    # Convolutions of blocked channels, which stay without padding of their own where the Pads stay.
    assert kinds["Conv"] == 2 and kinds["ReorderInput"] > 0 and kinds.get("Pad", 0) == (2 if length == 64 else 0)
    assert (found.in_onnxruntime()({"x": x})["output"] - model(x)).abs().max() < 1e-5


def test_integer_convolutions_pad_themselves_whatever_the_width(tmp_path):
    torch.manual_seed(0)
    model, x = Sequence().eval(), torch.randn(2, 16, 64, 1)
    recipe = Recipe.load("w8a8_static")
    found = exports.export(capture_module(model, {"x": x}), recipe, "cpu", tmp_path / "out", calibration=[{"x": x}])
    kinds = optimized_graph(found.folder, found.manifest).op_counts()
    assert kinds["QLinearConv"] == 2 and "Pad" not in kinds
