"""Embeddings as codes: the file looks up what the graph says, a tied output projection reads the same bytes of it."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.agreement import ROUNDING, assert_agree, assert_float16_adds_little, logits
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.random_decoders import HIDDEN, VOCAB, save_model
from helpers.runners import padded, prompt_feeds, tokens
from qexport.graph.edit import get_tensor, is_call
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import optimized_graph, unfused

ops = torch.ops.qexport
MASK = padded([9, 4, 6], "left")
RANDOM = CalibrationSpec(source="random", samples=4, sequence_length=16)
SCHEMES = ["w2a16_g16", "w2a16_g32_asym", "w3a16_g64", "w4a16_g32", "w4a16_g16_asym", "w8a16_g32", "w8a16_g64_asym"]


def tied(scheme, **fields):
    return Recipe(**{"scheme": "w4a16_g32", "calibration": RANDOM, "lm_head": scheme, "embedding": "tied", **fields})


@pytest.fixture
def export(export):
    return lambda recipe, target="cpu", single=False, family="llama_bias": export(family, recipe, target, single)


def rows_of(exported, run):
    """The embedding of a prompt as the file or the graph makes it."""
    name = exported.manifest.blocks[0].output
    return run(prompt_feeds(exported.captured, tokens(3, 9), MASK))[name]


def rows_in_pytorch(exported):
    block = exported.blocks[0]
    feeds = prompt_feeds(exported.captured, tokens(3, 9), MASK)
    values = {port.value: feeds[port.name] for port in exported.captured.inputs}
    results = block.module(*(values[name] for name in block.inputs))
    following = exported.blocks[1].inputs
    return next(r for n, r in zip(block.outputs, results, strict=True) if n == following[0])


def initializers(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {t.name: t for t in model.graph.initializer}, model


def region(tensor):
    found = {e.key: e.value for e in tensor.external_data}
    return found["location"], int(found["offset"]), int(found["length"])


@pytest.mark.by_default("w2a16_g16-*", "w3a16_g64-*", "w4a16_g32-*", "w8a16_g64_asym-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_model_computes_what_its_graph_says(export, scheme, target):
    exported = export(tied(scheme, accuracy_level=1), target, single=target == "cuda")
    assert torch.equal(rows_of(exported, exported.in_onnxruntime_with_blocks()), rows_in_pytorch(exported))
    assert_agree(exported, MASK, flips=0)
    ran, graph = logits(
        MASK, *((r(), exported.captured, torch.float32) for r in (exported.in_onnxruntime, exported.in_pytorch))
    )
    assert (ran - graph).abs().max() < ROUNDING * graph.abs().max()


def test_inputs_of_a_tied_projection_are_rounded_as_the_graph_shows(export):
    assert_agree(export(tied("w8a16_g32")), MASK, flips=0.02)


def test_float16_of_the_cuda_file_adds_what_float16_adds(export):
    half, single = (export(tied("w4a16_g32"), "cuda", single) for single in (False, True))
    assert_float16_adds_little(half, single, MASK)


@pytest.mark.by_default("gemma3-*", "opt-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("embedding", ["w8a16_g32", "w4a16_g64_asym"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt_neox"])
def test_an_embedding_with_codes_of_its_own(export, family, embedding):
    """Behind Gemma's stands a factor, before OPT's the ids are reshaped, and OPT has a second table for positions."""
    recipe = Recipe(scheme="w8a16_g32", embedding=embedding, accuracy_level=1)
    for target in ("cpu", "cuda"):
        exported = export(recipe, target, target == "cuda", family)
        looked_up = [n for n in exported.blocks[0].module.graph.nodes if is_call(n, ops.gather_quantized.default)]
        assert len(looked_up) == 1
        assert_agree(exported, MASK, flips=0)


@pytest.mark.slow
def test_groups_longer_than_the_kernels_blocks(tmp_path):
    changes = dict(hidden_size=1024, head_dim=64, intermediate_size=64, num_hidden_layers=1)
    wide = exports.capture(save_model("llama_bias", tmp_path / "wide", **changes))
    for scheme in ("w4a16_g1024_asym", "w2a16_g256"):
        exported = agreement.export(wide, tied(scheme, accuracy_level=1), "cpu", tmp_path / scheme)
        assert_agree(exported, MASK, flips=0)


# ---- one copy in the file -------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", ["w2a16_g16", "w4a16_g16_asym", "w8a16_g32"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_codes_and_scales_lie_once_in_the_file(export, scheme, target):
    exported = export(tied(scheme), target)
    tensors, model = initializers(exported.folder)
    gather = next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    product = next(n for n in model.graph.node if n.name == "lm_head")
    assert product.op_type == "MatMulNBits"
    table, weight = tensors[gather.input[0]], tensors[product.input[1]]
    assert table.name != weight.name and region(table) == region(weight)
    assert list(gather.input[2:]) == list(product.input[2:]), "scales and zero points are one tensor"
    assert np.prod(table.dims) == np.prod(weight.dims) == region(table)[2]

    regions = sorted({region(t) for t in tensors.values() if t.external_data})
    ends = [start + length for _, start, length in regions]
    assert [start for _, start, _ in regions] == [0, *ends[:-1]], "no gaps, no overlaps"
    data = exported.folder / "model.onnx.data"
    assert data.stat().st_size == sum(n for _, _, n in regions)
    large = [t.name for t in tensors.values() if np.prod(t.dims) >= VOCAB * HIDDEN and t.data_type in (1, 10)]
    assert large == [], "no float table is left"


@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("scheme", ["w2a16_g16_asym", "w3a16_g64", "w4a16_g32", "w8a16_g64_asym"])
def test_bytes_are_counted_once(export, scheme, target):
    exported = export(tied(scheme), target)
    sizes = exported.manifest.bytes
    assert sizes["model"] == sum(sizes[part] for part in ("quantized_linears", "embedding", "lm_head", "rest"))
    assert sizes["lm_head"] == 0 and exported.manifest.linears[-1].bytes == 0
    tensors, _ = initializers(exported.folder)
    table = {
        region(t) if t.external_data else t.name: t for n, t in tensors.items() if n.startswith("model.embed_tokens.")
    }
    assert sizes["embedding"] == sum(region(t)[2] if t.external_data else len(t.raw_data) for t in table.values())


def test_parts_of_other_files(export):
    float_table, float_head = 4 * VOCAB * HIDDEN, 4 * VOCAB * HIDDEN
    codes = VOCAB * HIDDEN // 2 + 4 * VOCAB * HIDDEN // 32

    def parts(family, **fields):
        sizes = export(Recipe(scheme="w4a16_g32", **fields), family=family).manifest.bytes
        return sizes["embedding"], sizes["lm_head"]

    assert parts("llama_bias") == (float_table, 0), "one float table"
    assert parts("llama_bias", embedding="w4a16_g32") == (codes, float_head), "and codes beside it"
    assert parts("llama_bias", lm_head="w4a16_g32") == (float_table, codes)
    assert parts("llama_bias", lm_head="w4a16_g32", embedding="tied") == (codes, 0)
    assert parts("llama") == (float_table, float_head), "not tied"
    assert parts("llama", lm_head="w4a16_g32", embedding="w4a16_g32") == (codes, codes)


# ---- together with other methods ------------------------------------------------------------------------------------

METHODS = {
    "gptq": dict(weights=section("weights", method="gptq", clip_search=True)),
    "hqq": dict(weights=section("weights", method="hqq")),
    "awq": dict(smooth=section("smooth", method="awq", alpha=0.5)),
    "lorc": dict(lorc=section("lorc", rank=4)),
    "zq_global": dict(weights=section("weights", method="zq_global", steps=2, learning_rates=[0.01])),
}


@pytest.mark.by_default("gptq", "awq")
@pytest.mark.parametrize("method", METHODS)
def test_no_method_moves_the_shared_codes(export, method):
    exported = export(tied("w4a16_g32", accuracy_level=1, **METHODS[method]))
    first, last = exported.blocks[0].module, exported.blocks[-1].module
    for part in ("codes", "scale"):
        name = f"model.embed_tokens.weight_{part}"
        assert torch.equal(get_tensor(first, name), get_tensor(last, name))
    assert_agree(exported, MASK, flips=0)
    tensors, model = initializers(exported.folder)
    product = next(n for n in model.graph.node if n.name == "lm_head")
    assert region(tensors[product.input[1]]) == region(tensors["model.embed_tokens.weight_codes.rows"])
    branches = [name for name in tensors if name.startswith("lm_head.lorc")]
    assert bool(branches) == (method == "lorc"), "a branch corrects what sharing cost"


# ---- what runs ------------------------------------------------------------------------------------------------------


def test_the_cpu_session_has_the_kernels(export):
    exported = export(tied("w4a16_g32"))
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == []
    counts = graph.op_counts()
    assert counts["MatMulNBits"] == 9 and counts["GatherBlockQuantized"] == 1
    assert not {"Reshape", "Transpose", "DequantizeLinear"} & {
        n.op_type for n in graph.nodes if "embed" in str(n.inputs)
    }


@pytest.mark.parametrize("scheme", ["w2a16_g16", "w4a16_g32", "w4a16_g16_asym", "w8a16_g32"])
def test_every_node_is_on_cuda(export, cuda_placement, scheme):
    exported = export(tied(scheme), "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    found = Counter(placed["optimized_ops"])
    assert found["GatherBlockQuantized"] == 1 and found["MatMulNBits"] == 9
