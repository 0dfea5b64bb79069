"""A cache of codes: the file against its graph and the float model, its type and bytes, and what refuses it."""

import copy

import numpy as np
import pytest
import torch

from helpers import exports
from helpers.agreement import ROUNDING
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, tokens
from qexport.api.exporting import export as export_model
from qexport.api.validating import validate
from qexport.errors import LoweringError, RecipeError
from qexport.graph.edit import is_call
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section
from qexport.runtime.decoder import open_decoder

CALIBRATION = CalibrationSpec(source="random", samples=16, sequence_length=48)
FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),), "calibration": CALIBRATION}
MASK = padded([9, 4, 6], "left")


def recipe_of(bits, scales="channel"):
    return Recipe(**FLOAT, kv_cache=section("kv_cache", bits=bits, scales=scales))


def empty_caches(feeds, inputs):
    """Feeds whose empty caches are of the type that the file has."""
    rows = len(feeds["input_ids"])
    caches = {p.name: torch.zeros(rows, p.dims[1], 0, p.dims[3], dtype=p.dtype) for p in inputs if "past" in p.name}
    return feeds | caches


def steps(run, feeds, count=4):
    """Logits of the real tokens of a prompt and of some more tokens, always the same ones."""
    real, found = MASK.bool(), []
    for step in range(count):
        results = run(feeds)
        found.append(results["logits"][real].float())
        real = torch.ones(len(MASK), 1, dtype=torch.bool)
        feeds = next_feeds(feeds, results, tokens(len(MASK), 1, seed=step)[:, 0])
    return torch.cat(found)


@pytest.mark.each_value_once
@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("bits, least", [(8, 30), (4, 8)])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt_oss"])  # rotated inside of attention, before it; sinks
def test_the_file_computes_what_its_graph_says_and_is_near_the_float_model(
    captured, tmp_path, family, bits, least, scales
):
    model = captured(family)
    exported = exports.export(model, recipe_of(bits, scales), "cpu", tmp_path / "out")
    assert exported.manifest.settings["kv_cache_bits"] == bits
    float_feeds = prompt_feeds(exported.captured, tokens(*MASK.shape), MASK)
    lowered = exported.lowered
    feeds = empty_caches(float_feeds, lowered.inputs)
    graph = exports.block_runner(exported.blocks, lowered.inputs, lowered.outputs)
    ran, wanted = steps(exported.in_onnxruntime(), feeds), steps(graph, feeds)
    # A key on the border between two codes may fall on either side; then a logit moves by a share of a code.
    different = (ran - wanted).abs().amax(-1) / wanted.abs().max()
    assert (different > ROUNDING).float().mean() <= 0.15 and different.max() < 2e-3
    reference = steps(captured_runner(load_weights(copy.deepcopy(exported.captured))), float_feeds)
    sqnr = 10 * torch.log10(reference.square().sum() / (ran - reference).square().sum())
    assert sqnr > least


@pytest.mark.parametrize("bits, dtype, width", [(8, np.int8, 16), (4, np.uint8, 8)])
def test_the_cache_is_held_in_codes(model_folder, tmp_path, bits, dtype, width):
    folder = export_model(model_folder("llama"), recipe_of(bits), out_dir=tmp_path / "out").folder
    decoder = open_decoder(folder, max_length=12, threads=1)
    decoder.run(np.array([[5, 6, 7]]))
    cache = decoder._cache[0].numpy()
    assert cache.dtype == dtype and cache.shape == (1, 2, 12, width) and (cache[:, :, :3] != 0).any()


def test_calibration_sees_every_head_apart_and_no_padding(captured, tmp_path):
    model = captured("llama")
    exported = exports.export(model, recipe_of(8), "cpu", tmp_path / "out")
    block = exported.blocks[1]
    node = next(n for n in block.module.graph.nodes if is_call(n, torch.ops.qexport.grouped_attention.default))
    scales = [getattr_of(block, n) for n in node.args[9:11]]
    assert [tuple(s.shape) for s in scales] == [(2, 1, 16)] * 2 and all(s.unique().numel() > 20 for s in scales)


def getattr_of(block, node):
    module = block.module
    for part in node.target.split("."):
        module = getattr(module, part)
    return module


def test_cuda_keeps_the_scales_in_float32_on_the_device(model_folder, tmp_path, cuda_placement):
    from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda

    result = export_model(model_folder("llama"), recipe_of(8), out_dir=tmp_path / "out", target="cuda")
    assert_decoder_on_cuda(cuda_placement(result.folder / "model.onnx", result.manifest.session, dims=PROMPT))
    assert "differs from the graph" in result.manifest.numerics["cache"]  # seen on a GPU


def test_validation_reads_it(model_folder, tmp_path):
    folder = export_model(model_folder("llama"), recipe_of(4), out_dir=tmp_path / "out").folder
    report = validate(folder, model_folder("llama"), windows=1, window=32)
    assert report.logits.kl_mean > 0


def test_standard_attention_refuses_it(model_folder, tmp_path):
    with pytest.raises(LoweringError, match="grouped attention"):
        export_model(model_folder("llama"), recipe_of(8), out_dir=tmp_path / "out", attention="standard")
    assert not (tmp_path / "out").exists()


def test_the_scheme_may_say_it():
    assert Recipe(scheme="w4a16_g32_kv8").kv_cache == section("kv_cache", bits=8)
    assert Recipe.load("w4a16_g64_asym_kv4").kv_cache == section("kv_cache", bits=4)
    assert Recipe.load("w8a8_dyn_kv8").scheme == "w8a8_dyn"
    with pytest.raises(RecipeError, match="w4a16_g32_kv2"):
        Recipe(scheme="w4a16_g32_kv2")


def e4m3_recipe(scales="channel"):
    return Recipe(**FLOAT, kv_cache=section("kv_cache", numbers="e4m3", scales=scales))


@pytest.mark.by_default("llama-tensor", "gpt_oss-channel")
@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_8_bit_floats_are_rounded_to_and_kept_as_floats_on_the_cpu(captured, tmp_path, family, scales):
    exported = exports.export(captured(family), e4m3_recipe(scales), "cpu", tmp_path / "out")
    assert "kv_cache_bits" not in exported.manifest.settings and exported.manifest.settings["attention"] == "grouped"
    feeds = prompt_feeds(exported.captured, tokens(*MASK.shape), MASK)
    ran, wanted = steps(exported.in_onnxruntime(), feeds), steps(exported.in_pytorch(), feeds)
    different = (ran - wanted).abs().amax(-1) / wanted.abs().max()
    # One value on the border between two numbers moves every later token of its text.
    assert (different > ROUNDING).float().mean() <= 0.25 and different.max() < 5e-3
    reference = steps(captured_runner(load_weights(copy.deepcopy(exported.captured))), feeds)
    assert 15 < 10 * torch.log10(reference.square().sum() / (ran - reference).square().sum()) < 60


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_cuda_keeps_8_bit_floats(captured, tmp_path, cuda_placement, family):
    from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda

    exported = exports.export(captured(family), e4m3_recipe(), "cuda", tmp_path / "out")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert any("__nv_fp8_e4m3" in launch for launch in placed["launches"])
    settings, inputs = exported.manifest.settings, exported.lowered.inputs
    assert (settings["kv_cache_bits"], settings["kv_cache_numbers"]) == (8, "e4m3")
    assert {p.dtype for p in inputs if "past" in p.name} == {torch.float8_e4m3fn}
    float_feeds = prompt_feeds(exported.captured, tokens(*MASK.shape), MASK)
    feeds = empty_caches(float_feeds, inputs)
    graph = steps(exports.block_runner(exported.blocks, inputs, exported.lowered.outputs), feeds)
    reference = steps(captured_runner(load_weights(captured(family))), float_feeds)
    assert 10 * torch.log10(reference.square().sum() / (graph - reference).square().sum()) > 15


def test_8_bit_floats_have_a_short_name():
    assert Recipe(scheme="w4a16_g32_kvfp8").kv_cache == section("kv_cache", numbers="e4m3")
    with pytest.raises(RecipeError, match="e4m3 numbers have 8 bits"):
        Recipe(scheme="w4a16_g32", kv_cache={"bits": 4, "numbers": "e4m3"})
