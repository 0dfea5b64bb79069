"""Operators of vision and speech models: files compute what modules compute, and weights made of others are found."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from helpers import exports
from helpers.random_modules import example_inputs, make_module
from helpers.runners import captured_runner, load_weights
from qexport.capture.module import capture_module
from qexport.graph.convolution_sites import convolutions
from qexport.graph.sites import linears
from qexport.recipe.recipe import Recipe

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])


class Computes(nn.Module):
    """A linear, and something behind it."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.linear(x))


def grids(x):
    """Positions of the last two axes added to x."""
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    return x + rows - 2 * columns


def filled(x):
    y = torch.zeros_like(x)
    y[..., 0] = 3.0
    y[:, :, 1] = x[:, :, 0] * 2
    y[..., 2:5] = x[..., 3:6]
    return y


def resized(**options):
    return lambda x: functional.interpolate(x, **options)


CASES = {
    "roll": lambda x: torch.roll(x, shifts=(-2, 3), dims=(2, 3)),
    "unflatten": lambda x: x.unflatten(2, (2, 3)).sum(2),
    "unflatten first": lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)),
    "expand_as": lambda x: x[..., :1].expand_as(x) - x,
    "reshape_as": lambda x: x.flatten(2).reshape_as(x) * 2,
    "tile": lambda x: x.tile(2, 1),
    "meshgrid": grids,
    "assignment": filled,
    "bilinear": resized(size=(9, 5), mode="bilinear"),
    "bilinear, corners": resized(size=(9, 5), mode="bilinear", align_corners=True),
    "bilinear, factor": resized(scale_factor=2.0, mode="bilinear"),
    "bicubic": resized(size=(9, 5), mode="bicubic"),
    "bilinear, averaged": resized(size=(4, 11), mode="bilinear", antialias=True),
    "bicubic, averaged": resized(scale_factor=0.4, mode="bicubic", antialias=True),
    "nearest": resized(size=(9, 5), mode="nearest"),
    "nearest, factor": resized(scale_factor=2.0, mode="nearest"),
}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_the_module_computes(tmp_path, name):
    model, random = Computes(CASES[name]).eval(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 8, generator=random)
    made = exports.export(capture_module(model, {"x": x}), FLOAT, "cpu", tmp_path / "out")
    for fed in (x, torch.randn(5, 3, 6, 8, generator=random)):
        with torch.no_grad():
            want = model(fed)
        for run in (made.in_onnxruntime(), captured_runner(load_weights(made.captured))):
            got = run({"x": fed})["output"]
            assert got.shape == want.shape and (got - want).abs().max() < 1e-5 * want.abs().max()


class Heads(nn.Module):
    """Attention whose queries, keys and values have one weight."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x[:, :1], x, x, need_weights=False)[0]


def test_parts_of_a_weight_are_linears_of_their_own(tmp_path):
    model, x = Heads().eval(), torch.randn(2, 5, 32)
    made = exports.export(capture_module(model, {"x": x}), Recipe(scheme="w8a16_g32"), "cpu", tmp_path / "out")
    found = [linear for block in made.captured.blocks for linear in linears(block.module.graph)]
    names = [linear.name for linear in found]
    assert len(names) == len(set(names)) == len(made.manifest.linears) >= 3
    assert sum(linear.shape[0] for linear in found) == 4 * 32
    with torch.no_grad():
        want = model(x)
    assert (made.in_onnxruntime()({"x": x})["output"] - want).abs().max() < 0.05 * want.abs().max()


class Sounds(nn.Module):
    """Padding by name, and a weight that has a direction and a length."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv1d(4, 8, 5, padding="same", dilation=2)
        self.valid = nn.Conv1d(8, 8, 3, padding="valid")
        self.normed = weight_norm(nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2)

    def forward(self, x):
        return self.normed(self.valid(self.same(x)))


def test_convolutions_of_any_spelling_are_quantized(all_convolutions, tmp_path):
    model, x = Sounds().eval(), torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    captured = capture_module(model, {"x": x}, {"x": {0: "batch", 2: "length"}})
    names = [name for block in captured.blocks for name in convolutions(block.module.graph)]
    assert names == ["same", "valid", "normed"]
    with torch.no_grad():
        want = model(x)
    assert (captured_runner(load_weights(captured))({"x": x})["output"] - want).abs().max() < 1e-6
    made = exports.export(
        capture_module(model, {"x": x}), Recipe(scheme="w8a8_static"), "cpu", tmp_path / "out", calibration=[{"x": x}]
    )
    assert [entry.name for entry in made.manifest.convolutions] == names
    assert (made.in_onnxruntime()({"x": x})["output"] - want).abs().max() < 0.05 * want.abs().max()


def test_kernels_that_are_padded_unequally(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(4, 8, (4, 3), padding="same")).eval(), torch.randn(2, 4, 9, 20)
    made = exports.export(capture_module(model, {"input": x}), FLOAT, "cpu", tmp_path / "out")
    with torch.no_grad():
        want = model(x)
    assert (made.in_onnxruntime()({"input": x})["output"] - want).abs().max() < 1e-5


@pytest.mark.slow
def test_what_a_block_hands_on_is_no_mask():
    """The layers of this model read a mask of bools before their hidden states."""
    captured = capture_module(make_module("beit"), example_inputs("beit"))
    for block in captured.blocks[1:]:
        value = next(n for n in block.module.graph.nodes if n.op == "placeholder")
        assert value.meta["spec"].dtype == torch.float32


class OnePicture(nn.Module):
    """Convolutions and pooling of [channels, height, width], without a batch in front."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 3, stride=2)

    def forward(self, x):
        x = self.up(self.conv(x))
        largest, places = functional.max_pool2d(x, 3, 1, 1, return_indices=True)
        means = functional.avg_pool2d(x, 3, 2), functional.adaptive_avg_pool2d(x[:, :12, :16], 4)
        return functional.max_pool2d(x, 2), largest, places, *means


def test_a_picture_may_have_no_batch(tmp_path):
    model, x = OnePicture().eval(), torch.randn(3, 6, 8)
    captured = capture_module(model, {"x": x}, {"x": {}})
    got = exports.export(captured, Recipe(scheme="float"), "cpu", tmp_path / "out").in_onnxruntime()({"x": x})
    with torch.no_grad():
        for want, value in zip(model(x), got.values(), strict=True):
            assert want.shape == value.shape and torch.allclose(want.float(), value.float(), atol=1e-5)
