"""Every stage of an export run alone, on what the stages before it made."""

import json

import pytest

from qexport.api.options import Options
from qexport.api.refusals import check_applicable
from qexport.api.stages.calibrating import calibrate
from qexport.api.stages.capturing import capture
from qexport.api.stages.lowering import lower
from qexport.api.stages.packaging import package
from qexport.api.stages.planning import plan
from qexport.api.stages.preparing import Request, prepare
from qexport.api.stages.quantizing import quantize
from qexport.artifact.output import claimed
from qexport.errors import InputError, RecipeError
from qexport.recipe.recipe import Recipe

BLOCKS = ["prologue", "model.layers.0", "model.layers.1", "epilogue"]


def request_for(model, recipe="w8a8_static", calibration="random", **options):
    chosen = Recipe.load(recipe).with_calibration(samples=2, sequence_length=16)
    return Request.of(model, chosen, Options(**options), calibration)


@pytest.fixture(scope="module")
def prepared(model_folder):
    return prepare(request_for(model_folder("llama")))


@pytest.fixture(scope="module")
def calibrated(prepared, captured):
    return calibrate(plan(capture(prepared.of_part(captured("llama"), prepared.recipe, prepared.options))))


def test_prepare_opens_the_model_and_finds_recipe_and_target(prepared, model_folder):
    assert prepared.source.path == model_folder("llama") and prepared.target.name == "cpu"
    assert prepared.recipe.calibration.source == "random" and prepared.asked and prepared.data is None
    assert not prepared.in_two_parts and list(prepared.seconds) == ["prepare"]


def test_a_seed_stands_in_the_place_of_the_recipes(model_folder):
    assert prepare(request_for(model_folder("llama"), seed=7)).recipe.calibration.seed == 7


def test_capture_makes_blocks_without_weights_and_leaves_what_it_is_given(prepared, captured):
    model = captured("llama")
    found = capture(prepared.of_part(model, prepared.recipe, prepared.options))
    assert [block.name for block in found.captured.blocks] == BLOCKS and found.changes == {}
    assert found.captured is not model and found.captured.blocks[0].module is not model.blocks[0].module
    assert found.recipe is prepared.recipe and list(found.seconds) == ["capture"]


def test_plan_decides_without_reading_a_weight(prepared, captured, monkeypatch):
    model = captured("llama")
    monkeypatch.setattr(type(model), "load", lambda *_: pytest.fail("a weight was read"))
    planned = plan(capture(prepared.of_part(model, prepared.recipe, prepared.options)))
    schemes = {p.name: p.scheme and p.scheme.name for p in planned.decisions.plan}
    assert schemes["model.layers.0.mlp.up_proj"] == "w8a8_static" and planned.projection.name == "lm_head"
    assert planned.read_last is None


def test_calibrate_checks_the_graph_and_makes_the_same_inputs_every_time(calibrated):
    assert calibrated.agreement.difference < calibrated.agreement.bound and calibrated.seen is None
    first, second = calibrated.batches(), calibrated.batches()
    assert first is not second and first.batches[0].keys() == second.batches[0].keys()
    assert "random" in calibrated.described


def test_quantize_lower_and_package(calibrated, tmp_path):
    with claimed(tmp_path / "out", overwrite=False) as work:
        quantized = quantize(calibrated, work)
        assert [item.block.name for item in quantized.blocks] == BLOCKS
        assert len(list(work.blocks.glob("*.safetensors"))) == len(BLOCKS)
        made = lower(quantized)
        assert [block.name for block in made.lowered.graphs] == BLOCKS and made.settings["attention"] == "grouped"
        assert not hasattr(quantized.blocks[0], "joined"), "what lowering knows stays with what it made"
        assert not (tmp_path / "out").exists()
        result = package(made, work)
    assert result.folder == tmp_path / "out" and (result.folder / "model.onnx").is_file()
    assert list(result.seconds) == ["capture", "plan", "calibrate", "quantize", "lower", "package"]
    report = json.loads((result.folder / "report.json").read_text())["export"]
    assert report["seconds"] == result.seconds and [block["name"] for block in report["blocks"]] == BLOCKS


@pytest.mark.parametrize(
    ("kind", "options", "recipe", "said"),
    [
        ("encoder", {"attention": "standard"}, "w8a8_static", "only decoders have a choice of attention"),
        ("module", {"attention": "standard"}, "w8a8_static", "only decoders have a choice of attention"),
        ("encoder", {}, "compact_kv8", "kv_cache is only for decoders, and this is an encoder"),
        ("encoder-decoder", {"logits": "last"}, "w8a8_static", "makes the logits of all tokens"),
        ("encoder-decoder", {}, "compact_kv8", "kv_cache is only for decoders"),
    ],
)
def test_an_option_that_means_nothing_is_refused(kind, options, recipe, said):
    with pytest.raises((InputError, RecipeError), match=said):
        check_applicable(kind, Options(**options), Recipe.load(recipe))


def test_example_inputs_are_of_modules(model_folder):
    request = Request.of(model_folder("llama"), "w8a16", Options(), example_inputs=())
    with pytest.raises(InputError, match="example_inputs: only an nn.Module takes them"):
        prepare(request)
