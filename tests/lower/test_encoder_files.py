"""The files of encoders compute in ONNX Runtime what their graphs compute in PyTorch, padding included."""

import pytest
from transformers import AutoModelForSequenceClassification

from helpers import exports
from helpers.breadth import quick
from helpers.random_modules import VOCAB, encoders, save_encoder
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport import generate, optimize, validate
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.errors import InputError
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.validation.placement import examine

KERNELS = {"w4a16_g32": "MatMulNBits", "w8a8_dyn": "MatMulIntegerToFloat", "w8a8_static": "MatMulIntegerToFloat"}
MASK = padded([6, 2, 9], "right")


def recipe_of(scheme):
    return Recipe(
        scheme=scheme, accuracy_level=1, calibration=CalibrationSpec(source="random", samples=4, sequence_length=16)
    )


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return save_encoder(request.param, tmp_path_factory.mktemp(request.param))


SCHEMES_OF = quick(["bert", "modernbert"], among=["bert", "roberta", "modernbert"])


@pytest.mark.by_default("modernbert")
@pytest.mark.parametrize("folder", SCHEMES_OF, indirect=True)
def test_every_scheme_agrees(folder, tmp_path):
    whole = capture_model(folder)
    feeds = encoder_batch(whole, tokens(*MASK.shape, vocab=VOCAB), MASK)
    for scheme, kernel in KERNELS.items():
        made = exports.export(capture_model(folder), recipe_of(scheme), "cpu", tmp_path / scheme)
        assert {entry.kernel for entry in made.manifest.linears} == {kernel}
        placed, _ = examine(made.folder, made.manifest, made.manifest.provider)
        assert not placed.unfused and set(placed.nodes_per_provider) == {"CPUExecutionProvider"}
        ran, graph = made.in_onnxruntime()(feeds), made.in_pytorch()(feeds)
        reference = captured_runner(load_weights(made.captured))(feeds)
        for name in ran:
            got, ours, want = (v[name][MASK.bool()] if v[name].dim() == 3 else v[name] for v in (ran, graph, reference))
            if scheme == "w4a16_g32":
                assert (got - ours).abs().max() < 2e-5 * ours.abs().max()
            # Less than a tenth of the power of the quantization error, where a code falls on the other side.
            assert sqnr_db(ours, got) > sqnr_db(want, ours) + 10


@pytest.mark.by_default("bert", "roberta")
@pytest.mark.parametrize("folder", encoders(), indirect=True)
def test_float_encoders_agree_to_rounding(folder, tmp_path):
    recipe = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
    made = exports.export(capture_model(folder), recipe, "cpu", tmp_path / "float")
    feeds = encoder_batch(made.captured, tokens(*MASK.shape, vocab=VOCAB), MASK)
    ran, want = made.in_onnxruntime()(feeds), captured_runner(load_weights(made.captured))(feeds)
    for name in want:
        got, ours = (v[name][MASK.bool()] if v[name].dim() == 3 else v[name] for v in (ran, want))
        assert (got - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["roberta"], indirect=True)
def test_recipes_for_longer_texts_than_the_model_reads(folder, tmp_path):
    """A preset calibrates on 256 tokens and validate reads 512; this model reads 62."""
    result = exports.exporting.export(folder, "w8a8_dyn", out_dir=tmp_path / "out", calibration="random")
    assert "32 sequences of 62 random tokens" in result.calibration
    report = validate(result.folder, folder, windows=2)
    assert not report.problems and [row.name for row in report.outputs] == ["last_hidden_state", "pooler_output"]
    assert min(row.sqnr_db for row in report.outputs) > 15 and len(report.layers.linears) == 13
    # A file for speed keeps its outputs, and an encoder generates nothing.
    optimize(result.folder)
    with pytest.raises(InputError, match="not a decoder"):
        generate(result.folder, "some text", max_new_tokens=1)


def test_a_classifier_is_exported_and_validated(tmp_path):
    folder = save_encoder("bert", tmp_path / "model", loader=AutoModelForSequenceClassification, num_labels=3)
    result = exports.exporting.export(folder, "w8a8_dyn", out_dir=tmp_path / "out", calibration="random")
    assert {p.name: p.scheme for p in result.plan}["classifier"] is None
    report = validate(result.folder, folder, windows=4)
    assert not report.problems and [row.name for row in report.outputs] == ["logits"]
    assert report.outputs[0].sqnr_db > 15
