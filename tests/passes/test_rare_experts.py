"""Experts and routers under passes: what a norm in front is divided by, and what few calibration tokens reached."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.pass_runs import plan_of, run_passes, stream_of
from helpers.random_decoders import save_model
from helpers.runners import captured_runner, load_weights, prompt_feeds, tokens
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.graph.edit import get_tensor
from qexport.passes.equalization.awq import AWQ
from qexport.passes.equalization.smoothquant import SmoothQuant
from qexport.passes.moe_coverage import FEW_TOKENS, CountChoices
from qexport.passes.weights.gptq import GPTQ
from qexport.recipe.recipe import CalibrationSpec, Recipe

IDS, MASK = tokens(4, 24), torch.ones(4, 24, dtype=torch.int64)
NEVER = "model.layers.1.mlp.experts.3.down_proj"


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A folder of a model in which no token chooses the last expert."""
    folder = save_model("glm4_moe", tmp_path_factory.mktemp("lopsided") / "model")
    weights = load_file(folder / "model.safetensors")
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        weights[name] = torch.tensor([0.0, 0.0, 0.0, -100.0])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(model):
    return captured_runner(model)(prompt_feeds(model, IDS, MASK))["logits"]


@pytest.mark.parametrize("smoothing", [AWQ, SmoothQuant])
def test_a_router_takes_back_what_its_norm_is_divided_by(captured, smoothing):
    model = load_weights(captured("mixtral"))
    before = logits(model)
    gate = "model.layers.0.mlp.gate.weight"
    weight = get_tensor(model.blocks[1].module, gate).clone()
    plan = plan_of(model, "w8a8_dyn" if smoothing is SmoothQuant else "w4a16_g32")
    assert plan["model.layers.0.mlp.gate"].scheme is None  # a router
    results = run_passes(model, [smoothing(plan)], stream_of(model, IDS, MASK))
    sites = [note.site for note in results["model.layers.0"][smoothing.__name__].changed]
    changed = get_tensor(model.blocks[1].module, gate)
    assert sites and not torch.equal(changed, weight)
    after = logits(model)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_experts_of_few_tokens_are_noted(captured):
    model = load_weights(captured("mixtral"))
    results = run_passes(model, [CountChoices(plan_of(model, "w4a16_g32"))], stream_of(model, IDS, MASK))
    for layer in (0, 1):
        result = results[f"model.layers.{layer}"]["CountChoices"]
        assert not result.changed
        # Two of four experts for each of 96 tokens: every one of them is chosen by fewer than the bound.
        seen = {note.site: int(note.what.split()[0]) for note in result.skipped}
        assert set(seen) == {f"model.layers.{layer}.mlp.experts.{e}.down_proj" for e in range(4)}
        assert sum(seen.values()) == 2 * 96 < 4 * FEW_TOKENS


def test_enough_tokens_are_no_note(captured):
    model = load_weights(captured("mixtral"))
    ids = tokens(32, 64)
    stream = stream_of(model, ids, torch.ones_like(ids), batch_size=8)
    results = run_passes(model, [CountChoices(plan_of(model, "w4a16_g32"))], stream)
    assert not results["model.layers.0"]["CountChoices"].skipped


def test_float_experts_and_other_models_are_not_looked_at(captured):
    model = captured("mixtral")
    step = CountChoices(plan_of(captured("llama"), "w4a16_g32"))
    assert not any(step.applies_to(block.module) for block in model.blocks)
    assert not any(step.applies_to(block.module) for block in captured("llama").blocks)


def test_gptq_rounds_what_no_token_reached_to_nearest_and_says_so(lopsided):
    model = load_weights(capture_model(lopsided))
    plan = plan_of(model, "w4a16_g32")
    results = run_passes(model, [GPTQ(plan)], stream_of(model, IDS, MASK))
    notes = {n.site: n.what for block in results.values() for n in block["GPTQ"].skipped if plan[n.site].scheme}
    assert notes == {NEVER: "rounded to nearest: no calibration token reached it"}


@pytest.mark.by_default("w4a16_g32-gptq")
@pytest.mark.parametrize("scheme, method", [("w4a16_g32", "gptq"), ("w8a8_static", "rtn"), ("w4a16_g32", "zq_local")])
def test_an_expert_that_nobody_chooses_does_not_stop_an_export(lopsided, tmp_path, scheme, method):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=24)
    recipe = Recipe(scheme=scheme, weights={"method": method}, calibration=calibration)
    done = export(lopsided, recipe, out_dir=tmp_path / "out")
    assert done.rarely_chosen[NEVER] == f"0 of 96 calibration tokens chose its expert, fewer than {FEW_TOKENS}"
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["export"]["blocks"]
    assert [NEVER, done.rarely_chosen[NEVER]] in blocks[2]["skipped"]["CountChoices"]
