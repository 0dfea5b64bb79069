"""Convolutions, vision transformers, encoder-decoders without a cache: eager, graph and ONNX Runtime agree."""

import pytest
import torch
from torch import nn

import exporting
from modules import VOCAB, clip, cnn, t5, vit, whisper
from qexport.capture.module import capture_module
from qexport.numerics.metrics import sqnr_db
from qexport.recipe import Recipe
from qexport.validate import validate
from qexport.validate.placement import examine
from stepping import captured_runner, load_weights, padded, tokens

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
MASK = padded([4, 7], "right")
TEXT = {0: "batch", 1: "length"}
IMAGE_AXES = {"image": {0: "batch", 2: "height", 3: "width"}}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "vit": (vit, {"pixel_values": images(2, 3, 16, 16)}, None),
    "clip": (
        clip,
        {"input_ids": tokens(2, 7, vocab=VOCAB), "pixel_values": images(3, 3, 16, 16), "attention_mask": MASK},
        {
            "input_ids": {0: "texts", 1: "length"}, "attention_mask": {0: "texts", 1: "length"},
            "pixel_values": {0: "images"},
        },
    ),
    "cnn": (cnn, {"image": images(2, 3, 16, 16)}, IMAGE_AXES),
    "t5": (
        t5, {"input_ids": tokens(2, 7, vocab=VOCAB), "attention_mask": MASK, "decoder_input_ids": tokens(2, 5, 1)},
        {"input_ids": TEXT, "attention_mask": TEXT, "decoder_input_ids": {0: "batch", 1: "written"}},
    ),
    "whisper": (
        whisper, {"input_features": images(2, 16, 32), "decoder_input_ids": tokens(2, 5, 1)},
        {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "written"}},
    ),
}  # fmt: skip
CONVOLUTIONS = {"vit": 1, "clip": 1, "cnn": 6, "t5": 0, "whisper": 2}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, inputs, axes = CASES[request.param]
    return request.param, build(), inputs, axes


def other_sizes(inputs):
    """The same inputs with one row more, CNN images larger."""
    more = {n: torch.cat([t, t[:1]]) for n, t in inputs.items()}
    return {n: t.repeat(1, 1, 2, 3) if n == "image" else t for n, t in more.items()}


def eager(model, inputs):
    with torch.no_grad():
        made = model(**inputs)
    return {"output": made} if isinstance(made, torch.Tensor) else made


def looked_up(result, name):
    for part in name.split("."):
        result = result[part]
    return result


def test_float_models_agree(case, tmp_path):
    _, model, inputs, axes = case
    made = exporting.export(capture_module(model, inputs, axes), FLOAT, "cpu", tmp_path / "out")
    for fed in (inputs, other_sizes(inputs)):
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


def test_schemes_agree_and_fuse(case, tmp_path):
    name, model, inputs, axes = case
    for scheme, kernel in (("w8a8_static", "MatMulIntegerToFloat"), ("w4a16_g32", "MatMulNBits")):
        made = exporting.export(
            capture_module(model, inputs, axes), Recipe(scheme=scheme, accuracy_level=1), "cpu", tmp_path / scheme,
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
    result = exporting.exporting.export(
        Twice(), recipe, out_dir=tmp_path / "out", example_inputs=(x,), calibration=[(x,)]
    )
    reasons = {c.name: c.reason for c in result.convolutions}
    assert reasons == {"conv": "its weight is used several times", "other": "kept in float by the recipe"}
    result = exporting.exporting.export(
        cnn(), Recipe(scheme="w8a8_dyn"), out_dir=tmp_path / "dyn", example_inputs=(images(2, 3, 16, 16),)
    )
    assert {c.reason for c in result.convolutions} == {"w8a8_dyn has no convolution: w8a8_static has one"}


def test_a_cnn_is_validated_on_images(tmp_path):
    model, batches = cnn(), [{"image": images(4, 3, 16, 16)}]
    result = exporting.exporting.export(
        model, "w8a8_static", out_dir=tmp_path / "out", example_inputs=batches[0], calibration=batches,
        dynamic_shapes=IMAGE_AXES,
    )  # fmt: skip
    report = validate(result.folder, model, inputs=[{"image": images(2, 3, 24, 16)}])
    assert not report.problems and report.outputs[0].sqnr_db > 20
    manifest = result.manifest
    broken = manifest.model_copy(
        update={"convolutions": (manifest.convolutions[0].model_copy(update={"kernel": "ConvInteger"}),)}
    )
    placed, _ = examine(result.folder, broken, broken.provider)
    assert [(u.name, u.found) for u in placed.unfused] == [("stem", "QLinearConv")]
