"""Files of further families: ONNX Runtime agrees with the graph in prefill and decoding, and CUDA computes it all."""


import pytest
import torch

from helpers import agreement
from helpers.agreement import STEP, assert_agree
from helpers.breadth import quick
from helpers.cuda_placement.models import CPU, PROMPT
from helpers.random_decoders import BREADTH
from helpers.runners import captured_runner, load_weights, padded
from qexport.errors import RecipeError
from qexport.plan.model_plan import plan_for
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.targets.base import target_for

SCHEMES = ("w4a16_g32", "w8a8_dyn", "w8a8_static")
# Their files have what others have not: biases by position, a parallel block, turned positions of another order, an
# unusual norm and head, sinks and experts.
LOWERED = ("bloom", "falcon", "gptj", "cohere", "gpt_oss")
MASK = padded([9, 4, 6], "left")
WRITTEN_OUT = {
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite", "axk1", "bailing_hybrid", "kimi_linear",
            "longcat_flash",
        ),
        "cache holds what keys and values are made of",
    ),
    **dict.fromkeys(
        (
            "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5", "olmo_hybrid", "bamba", "granitemoehybrid", "falcon_h1",
            "nemotron_h", "zamba2", "jamba", "zamba", "lfm3", "minimax", "qwen3_5_moe",
        ),
        "something other than attention reads the attention mask",
    ),
    **dict.fromkeys(("mamba2", "mamba", "falcon_mamba", "rwkv", "xlstm"), "none of its layers keeps keys and values"),
    "gpt_neo": "a mask of its own", "diffllama": "several attentions read one cache", "llama4": "attend in chunks",
    "gemma3n": "the keys and values of others", "recurrent_gemma": "layers of it keep states",
    "roformer_decoder": "count the places of tokens in their row",
}  # fmt: skip
OTHERWISE = {"doge", "gemma4_shared"}
# Arithmetic of lengths; a look-up in a table would be followed by a copy.
SIZES = {"Add", "Cast", "Concat", "Gather", "Max", "Mul", "Neg", "Range", "Squeeze", "Sub", "Unsqueeze"}


def recipe_of(scheme):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(scheme=scheme, lm_head=scheme, weights={"method": "rtn"}, calibration=calibration)


@pytest.mark.by_default("gpt_oss", "bloom", "cohere")
@pytest.mark.parametrize("family", quick(LOWERED, among=BREADTH))
def test_onnxruntime_agrees_with_the_graph(captured, tmp_path, family):
    model = captured(family)
    for scheme in SCHEMES:
        exported = agreement.export(model, recipe_of(scheme), "cpu", tmp_path / scheme)
        # A token flips where an activation lies on the border of two codes: one in a hundred at most.
        # Of an expert of few features it is more of the largest element.
        assert_agree(exported, MASK, flips=0.02, step=0.03 if family == "flex_olmo" else STEP)
    settings = exported.manifest.settings
    assert settings["attention"] == ("standard" if family in {*WRITTEN_OUT, *OTHERWISE} else "grouped")
    assert WRITTEN_OUT.get(family, "") in settings.get("attention_reason", "")


# One that counts the places of tokens in a padded row.
@pytest.mark.parametrize("family", quick(["bart_decoder"], among=BREADTH))
def test_a_file_without_quantization_is_the_model(captured, tmp_path, family):
    """Whatever becomes of its attention and its cache.

    On the left only: behind padding on the right transformers counts it among the tokens of a sliding window, and a
    cache without gaps does not.
    """
    recipe = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
    exported = agreement.export(captured(family), recipe, "cpu", tmp_path / "out")
    run = captured_runner(load_weights(captured(family)))
    pairs = ((runner, exported.captured, torch.float32) for runner in (exported.in_onnxruntime(), run))
    got, want = agreement.logits(MASK, *pairs)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_a_cache_of_codes_is_refused_where_attention_is_written_out(captured, tmp_path):
    recipe = Recipe(scheme="w4a16_g32_kv8", weights={"method": "rtn"})
    with pytest.raises(RecipeError, match="written out"):
        agreement.export(captured("diffllama"), recipe, "cpu", tmp_path / "out")


@pytest.mark.parametrize("family", quick(LOWERED, among=BREADTH))
def test_every_linear_is_planned_but_routers_and_shared_ones(captured, family):
    model, recipe = captured(family), recipe_of("w8a8_dyn")
    plan, _ = plan_for(model, recipe, target_for("cpu", recipe).dtype.itemsize)
    left = {p.name: p.reason for p in plan if p.scheme is None}
    assert all("router" in why or "shared" in why for why in left.values()), left
    assert len(left) <= len(model.blocks) < len(plan)


@pytest.mark.by_default("gpt_oss", "bloom", "cohere")
@pytest.mark.parametrize("family", quick(LOWERED, among=BREADTH))
def test_nothing_falls_back_to_the_cpu_on_cuda(captured, cuda_placement, tmp_path, family):
    exported = agreement.export(captured(family), recipe_of("w4a16_g32"), "cuda", tmp_path / "out")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0
    assert set(placed["nodes"].get(CPU, ())) <= SIZES
