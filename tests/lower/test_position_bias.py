"""Biases by the place of a key (ALiBi) in grouped attention: what transformers computes, and what has no form."""

import pytest
import torch

from helpers import agreement, exports
from helpers.breadth import quick
from helpers.random_decoders import reference_model, save_model
from helpers.runners import captured_runner, load_weights, padded, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.errors import LoweringError
from qexport.graph.views import Add, CachedAttention
from qexport.lower.block_io import producers
from qexport.lower.gqa import Unsuited, plan_grouping
from qexport.lower.position_bias import Masks
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section

FAMILIES = ("bloom", "mpt", "falcon_alibi")
MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 12, dtype=torch.int64)]
FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}


def found(captured):
    """The biases of all layers."""
    masks = Masks(captured, producers(captured), captured.load)
    nodes = ((block, n) for block in captured.blocks for n in block.module.graph.nodes)
    return [masks.bias(block, site.mask) for block, n in nodes if (site := CachedAttention.match(n))]


@pytest.mark.parametrize("family", quick(["bloom"], among=FAMILIES))
def test_a_file_of_floats_is_transformers_model(tmp_path, family):
    folder = save_model(family, tmp_path / "model")
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    settings = exported.manifest.settings
    assert settings["attention"] == "grouped" and settings["past_present_share_buffer"]
    # Behind padding on the right MPT counts the gap among the places of a row; a cache without gaps has none.
    for mask in MASKS if family != "mpt" else [MASKS[0], MASKS[2]]:
        runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(["falcon_alibi"], among=FAMILIES))
def test_a_cache_of_codes_stays_near(captured, tmp_path, family):
    calibration = CalibrationSpec(source="random", samples=8, sequence_length=32)
    recipe = Recipe(**FLOAT, kv_cache=section("kv_cache", bits=8), calibration=calibration)
    exported = exports.export(captured(family), recipe, "cpu", tmp_path / "out")
    float_runner = captured_runner(load_weights(captured(family)))
    run = exported.in_onnxruntime()
    assert exported.manifest.settings["kv_cache_bits"] == 8
    lowered = exported.lowered
    mask = torch.ones(2, 9, dtype=torch.int64)
    feeds = agreement.prompt_feeds(exported.captured, agreement.tokens(*mask.shape), mask)
    codes = {p.name: torch.zeros(2, p.dims[1], 0, p.dims[3], dtype=p.dtype) for p in lowered.inputs if "past" in p.name}
    got, want = run(feeds | codes)["logits"], float_runner(feeds)["logits"]
    assert agreement.sqnr_db(want, got) > 30
    with pytest.raises(LoweringError, match=r"CUDAExecutionProvider has no kernel for a cache of codes .* \(ALiBi\)"):
        exports.export(captured(family), recipe, "cuda", tmp_path / "cuda")


def test_slopes_are_those_of_the_paper(captured):
    slopes = torch.tensor([[0.25], [0.0625], [0.015625], [0.00390625]])
    biases = found(captured("bloom"))
    assert len(biases) == 2 and all(torch.allclose(bias, slopes, rtol=1e-5, atol=0) for bias in biases)
    # Falcon adds them to scores and to the mask, both times over the root of the size of a head.
    assert all(torch.allclose(bias, slopes / 2, rtol=1e-5, atol=0) for bias in found(captured("falcon_alibi")))


@pytest.mark.slow
def test_places_that_are_rounded_become_a_table(tmp_path):
    """Falcon's biases are bfloat16 products: from 256 places on no slope gives them."""
    captured = capture_model(save_model("falcon_alibi", tmp_path, max_position_embeddings=512))
    table = found(captured)[0]
    wanted = (torch.tensor([0.25])[:, None] * torch.arange(512)).bfloat16().float() / 2
    assert table.shape == (4, 512)
    assert torch.allclose(table[0] - table[0, 0], wanted[0], atol=1e-5)


def test_a_bias_that_grows_with_no_slope_is_not_grouped_where_no_length_is_stated(captured):
    model = captured("bloom")
    del model.settings["max_position_embeddings"]
    block = model.blocks[0]
    node = next(n for n in block.module.graph.nodes if Add.match(n) and n.name.startswith("add_tensor"))
    with block.module.graph.inserting_after(node):
        square = block.module.graph.call_function(torch.ops.aten.mul.Tensor, (node, node))
    square.meta = dict(node.meta)
    node.replace_all_uses_with(square, delete_user_cb=lambda user: user is not square)
    with pytest.raises(Unsuited, match="more than a number for a head and the place of a key"):
        plan_grouping(model, model.load)
