"""Convolutions, vision transformers, encoder-decoders without a cache: eager, graph and ONNX Runtime agree."""

import pytest
import torch
from torch import nn

from helpers import exports
from helpers.random_modules import MODULES, axes, cnn, example_inputs, looked_up, make_module
from helpers.runners import captured_runner, load_weights
from qexport.api.inspecting import inspect
from qexport.api.validating import validate
from qexport.capture.module import capture_module
from qexport.cli.printers.inspect import print_inspection
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import Recipe
from qexport.targets.kernels.convolutions import slower_than_float
from qexport.validation.placement import examine

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
IMAGE_AXES = {"image": {0: "batch", 2: "height", 3: "width"}}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


MODELS = ("vit", "clip", "t5", "whisper")
CONVOLUTIONS = {"vit": 1, "clip": 1, "cnn": 6, "t5": 0, "whisper": 2}


@pytest.fixture(
    scope="module", params=["cnn", *(pytest.param(m, marks=pytest.mark.slow) if m == "t5" else m for m in MODELS)]
)
def case(request):
    """Name, model, two calls' inputs and dynamic dimensions."""
    if request.param == "cnn":
        return request.param, cnn(), ({"image": images(2, 3, 16, 16)}, {"image": images(3, 3, 32, 48)}), IMAGE_AXES
    inputs = example_inputs(request.param), example_inputs(request.param, more=1)
    return request.param, make_module(request.param), inputs, axes(request.param)


def eager(model, inputs):
    with torch.no_grad():
        made = model(**inputs)
    return {"output": made} if isinstance(made, torch.Tensor) else made


@pytest.mark.by_default("cnn", "clip")
def test_float_models_agree(case, tmp_path):
    _, model, inputs, dynamic = case
    made = exports.export(capture_module(model, inputs[0], dynamic), FLOAT, "cpu", tmp_path / "out")
    for fed in inputs:
        want, graph, ran = (
            eager(model, fed),
            captured_runner(load_weights(made.captured))(fed),
            made.in_onnxruntime()(fed),
        )
        assert graph.keys() == ran.keys()
        for name in ran:
            wanted = looked_up(want, name)
            assert ran[name].shape == wanted.shape
            for got in (ran[name], graph[name]):
                assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODULES if name not in MODELS])
def test_further_models_agree(name, tmp_path):
    model, inputs = make_module(name), [example_inputs(name, more) for more in (0, 1)]
    made = exports.export(capture_module(model, inputs[0], axes(name)), FLOAT, "cpu", tmp_path / "out")
    for fed in inputs:
        want, ran = eager(model, fed), made.in_onnxruntime()(fed)
        for output, got in ran.items():
            wanted = looked_up(want, output)
            assert got.shape == wanted.shape and (got - wanted).abs().max() < 5e-5 * wanted.abs().max()


@pytest.mark.by_default("cnn", "clip")
def test_schemes_agree_and_fuse(all_convolutions, case, tmp_path):
    name, model, (inputs, _), dynamic = case
    for scheme, kernel in (("w8a8_static", "MatMulIntegerToFloat"), ("w4a16_g32", "MatMulNBits")):
        made = exports.export(
            capture_module(model, inputs, dynamic), Recipe(scheme=scheme, accuracy_level=1), "cpu", tmp_path / scheme,
            calibration=[inputs],
        )  # fmt: skip
        placed, _ = examine(made.folder, made.manifest, made.manifest.provider)
        assert not placed.unfused and {e.kernel for e in made.manifest.linears} == {kernel}
        expected = CONVOLUTIONS[name] if scheme == "w8a8_static" else 0
        assert len(made.manifest.convolutions) == placed.op_counts.get("QLinearConv", 0) == expected
        ran, graph, want = made.in_onnxruntime()(inputs), made.in_pytorch()(inputs), eager(model, inputs)
        for key in ran:
            wanted = looked_up(want, key)
            assert sqnr_db(wanted, ran[key]) > (15 if scheme == "w8a8_static" else 8)
            # Codes of inputs, and of the outputs of convolutions, may fall on the other side here and there.
            assert sqnr_db(graph[key], ran[key]) > sqnr_db(wanted, graph[key]) + 5


def test_why_convolutions_stay_float(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.other(self.conv(self.conv(x)))

    x = images(2, 3, 8, 8)
    recipe = Recipe(scheme="w8a8_static", overrides=[{"match": "other", "scheme": "float"}])
    result = exports.exporting.export(
        Twice(), recipe, out_dir=tmp_path / "out", example_inputs=(x,), calibration=[(x,)]
    )
    reasons = {c.name: c.reason for c in result.convolutions}
    assert reasons == {"conv": "its weight is used several times", "other": "kept in float by the recipe"}
    result = exports.exporting.export(
        cnn(), Recipe(scheme="w8a8_dyn"), out_dir=tmp_path / "dyn", example_inputs=(images(2, 3, 16, 16),)
    )
    assert {c.reason for c in result.convolutions} == {"w8a8_dyn has no convolution: w8a8_static has one"}


def test_a_cnn_is_validated_on_images(tmp_path):
    model, batches = cnn(), [{"image": images(4, 3, 16, 16)}]
    result = exports.exporting.export(
        model, "w8a8_static", out_dir=tmp_path / "out", example_inputs=batches[0], calibration=batches,
        dynamic_shapes=IMAGE_AXES,
    )  # fmt: skip
    report = validate(result.folder, model, inputs=[{"image": images(2, 3, 24, 16)}])
    assert not report.problems and report.outputs[0].sqnr_db > 20
    assert "5 quantized convolutions run as QLinearConv" in report.verdict[1]
    manifest = result.manifest
    broken = manifest.model_copy(
        update={"convolutions": (manifest.convolutions[0].model_copy(update={"kernel": "ConvInteger"}),)}
    )
    placed, _ = examine(result.folder, broken, broken.provider)
    assert [(u.name, u.found) for u in placed.unfused] == [("layers.0.wide", "QLinearConv")]


@pytest.mark.parametrize(
    ("shape", "groups", "slow"),
    [
        ((10, 3, 3, 3), 1, True), ((64, 3, 7, 7), 1, False), ((16, 10, 3, 3), 1, True), ((16, 10, 5, 5), 1, False),
        ((32, 16, 3, 3), 1, False), ((32, 16, 1, 1), 1, False), ((4, 32, 1, 1), 1, True), ((32, 16, 3), 1, False),
        ((16, 1, 3, 3), 16, True), ((32, 1, 3, 3), 32, False), ((64, 1, 7, 7), 64, True), ((8, 4, 3, 3), 2, False),
    ],
)  # fmt: skip
def test_convolutions_that_are_slower_as_integers(shape, groups, slow):
    assert bool(slower_than_float(shape, groups)) == slow


def test_an_inspection_lists_convolutions(tmp_path, capsys):
    x = images(2, 3, 16, 16)
    recipe = Recipe(scheme="w8a8_static", overrides=[{"match": "last", "scheme": "float"}])
    found = inspect(cnn(), recipe, example_inputs=(x,))
    exported = exports.exporting.export(
        cnn(), recipe, out_dir=tmp_path / "out", example_inputs=(x,), calibration=[(x,)]
    )
    assert list(found.convolutions) == exported.convolutions
    # The first and the last convolution and the biases take four bytes a number, the other weights one.
    kept = [p for p in found.convolutions if p.scheme is None]
    assert [p.name for p in kept] == ["stem", "last"]
    everything = inspect(cnn(), recipe, example_inputs=(x,), form="qdq")
    assert [p.name for p in everything.convolutions if p.scheme is None] == ["last"]
    plain = inspect(cnn(), "w8a8_dyn", example_inputs=(x,))
    assert plain.bytes["rest"] - found.bytes["rest"] == 3 * sum(p.bytes for p in found.convolutions if p.scheme)
    print_inspection(found, all_layers=False)
    shown = capsys.readouterr().out
    assert "layers.[0-1].wide" in shown and "1 of 1 linears and 4 of 6 convolutions quantized" in shown
    listed = found.as_dict()["convolutions"]
    assert listed[0] == {
        "name": "stem", "block": "prologue", "shape": [32, 3, 3, 3], "bytes": 3456,
        "reason": "an integer convolution of 3 channels with a kernel of 3x3 is slower than float", "scheme": "float",
    }  # fmt: skip
