"""Scales of 8 bits in a file: the numbers of the graph, the kernels of others, and the bytes that were planned."""

from collections import Counter

import onnx
import pytest

from helpers.agreement import assert_agree
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.runners import padded
from qexport.artifact.manifest import MODEL_FILE
from qexport.errors import RecipeError
from qexport.plan.linear_plan import LinearPlan, weight_bytes
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import optimized_graph, unfused

MASK = padded([9, 4, 6], "left")
RANDOM = CalibrationSpec(source="random", samples=2, sequence_length=8)
SCHEMES = ["w4a16_g32_s8", "w4a16_g512_s8", "w4a16_g16_asym_s8", "w2a16_g32_s8", "w3a16_g64_asym_s8", "w4a8_g32_s8",
           "nf4_g32_s8", "nf4_g512_s8"]  # fmt: skip
TIED = ["w4a16_g32_s8", "w2a16_g32_asym_s8"]


def recipe(scheme, **fields):
    return Recipe(**{"scheme": scheme, "lm_head": scheme, "accuracy_level": 1, "calibration": RANDOM, **fields})


def tied(scheme):
    return recipe("w4a16_g32_s8", lm_head=scheme, embedding="tied")


def constants(folder):
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    return {tensor.name: tensor for tensor in graph.initializer}


def assert_fused(exported):
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == [] and graph.op_counts()["Gather"] <= 2


@pytest.mark.by_default("w4a16_g32_s8-*", "w4a16_g512_s8-*", "w3a16_g64_asym_s8-*", "nf4_g32_s8-*", "w4a8_g32_s8-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("form", ["native", "qdq"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_computes_what_its_graph_says(export, scheme, target, form):
    if form == "qdq" and "nf4" in scheme:
        pytest.skip("tables of values have no standard form")
    options = {"form": "qdq", "opset": 25} if form == "qdq" else {}
    assert_agree(export("llama", recipe(scheme), target, single=target == "cuda", **options), MASK, flips=0)


@pytest.mark.by_default("w4a8_g32_s8", "nf4_g512_s8", "w3a16_g64_asym_s8", "w4a16_g16_asym_s8")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_takes_the_bytes_that_were_planned_and_runs_in_the_kernel(export, scheme):
    exported = export("llama", recipe(scheme))
    for entry in exported.manifest.linears:
        plan = LinearPlan(entry.name, entry.block, entry.shape, Scheme.parse(entry.scheme))
        # A few bytes of activations: a scale of one, and a zero point.
        assert 0 <= entry.bytes - weight_bytes(plan) <= (5 if "a8" in scheme else 0), entry.name
    tensors = constants(exported.folder)
    assert {t.data_type for name, t in tensors.items() if "weight_scale" in name} == {onnx.TensorProto.UINT8}
    assert_fused(exported)


@pytest.mark.by_default("w4a16_g32_s8")
@pytest.mark.parametrize("scheme", TIED)
def test_a_tied_table_has_its_bytes_once(export, scheme):
    exported = export("llama_bias", tied(scheme))
    assert_agree(exported, MASK, flips=0)
    names = [name for name in constants(exported.folder) if "scale" in name and "embed" in name]
    assert len(names) == 2  # bytes of the groups and of the rows
    assert_fused(exported)


def test_every_node_is_on_cuda(export, cuda_placement):
    exported = export("llama", recipe("w4a16_g32_s8"), "cuda")
    placed = cuda_placement(exported.folder / MODEL_FILE, exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert Counter(placed["optimized_ops"])["MatMulNBits"] == 9


@pytest.mark.parametrize("scheme", ["w4a16_pc_s8", "w8a16_g32_s8", "w4a8_g32_s8_int", "nf4_dq_s8"])
def test_only_groups_that_a_kernel_reads_have_them(scheme):
    with pytest.raises(RecipeError, match="8-bit scales are those of groups|finer than scales|unknown scheme"):
        Scheme.parse(scheme)
