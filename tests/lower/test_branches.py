"""Linears with a branch: the file computes what the graph says, and the branch costs the product beside it no fusion.

See test_agreement.py for what agreeing means.
"""

from collections import Counter

import pytest
import torch

from helpers import exports
from helpers.agreement import assert_agree, assert_float16_adds_little, logits
from helpers.breadth import quick
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.runners import captured_runner, load_weights, padded
from qexport.graph.sites import by_input, linears
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import optimized_graph, unfused

MASK = padded([9, 4, 6], "left")
RANK4, INT8 = section("lorc", rank=4), section("lorc", rank=4, factors="int8")
SHARED = section("lorc", rank=6, factors="int8", shared=True, weighted=True)
OUTLIERS = section("llm_int8", threshold=4.0)  # a few features of every value, or none
METHODS = {
    "lorc": dict(scheme="w4a16_g32", lorc=RANK4),
    "lorc, level 1": dict(scheme="w4a16_g32", lorc=RANK4, accuracy_level=1),
    "lorc, int8": dict(scheme="w4a16_g32", lorc=INT8),
    "lorc, int8, level 1": dict(scheme="w4a16_g32", lorc=INT8, accuracy_level=1),
    "lorc, int8, shared": dict(scheme="w4a16_g32", lorc=SHARED),
    "lorc after gptq": dict(scheme="w4a16_g32", lorc=RANK4, weights=section("weights", method="gptq")),
    "lorc, w8a8": dict(scheme="w8a8_dyn", lorc=RANK4),
    "lorc, int8, shared, static": dict(scheme="w8a8_static", lorc=SHARED),
    "lorc, expanded": dict(scheme="w4a8_g32_int", lorc=INT8),
    "llm_int8": dict(scheme="w8a8_dyn", llm_int8=OUTLIERS),
    "llm_int8, static": dict(scheme="w8a8_static", llm_int8=OUTLIERS),
    "llm_int8, groups": dict(scheme="w4a8_g32", llm_int8=OUTLIERS),
    "both": dict(scheme="w8a8_static", lorc=SHARED, llm_int8=OUTLIERS),
}
QUICK = ("lorc, int8, level 1", "lorc after gptq", "lorc, int8, shared, static", "lorc, expanded", "llm_int8", "both")
EXACT = ("lorc, level 1", "lorc, int8, level 1")  # nothing in the graph rounds activations


def recipe_of(**fields):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(calibration=calibration, **{"lm_head": fields["scheme"], **fields})


@pytest.fixture
def export(export):
    return lambda family, fields, target, single=False: export(family, recipe_of(**fields), target, single)


def base_kernel(scheme, target):
    if scheme in ("w4a16_g32", "w4a8_g32"):
        return "MatMulNBits"
    return "MatMulIntegerToFloat" if target == "cpu" else "MatMulInteger"


def values_of(exported):
    """How many values the linears of the float model read."""
    return sum(len(by_input(linears(block.module.graph))) for block in exported.captured.blocks)


def parts_of(exported, lorc):
    """How many weight-only products the branches must add: two for each value that they share, or for each linear."""
    if lorc is None or lorc.factors == "float":
        return 0
    return 2 * (values_of(exported) if lorc.shared else len(exported.manifest.linears))


def buffers(exported, ending):
    return {
        name: tensor
        for block in exported.blocks
        for name, tensor in block.module.named_buffers()
        if name.endswith(ending)
    }


@pytest.mark.by_default("lorc, int8, level 1", "lorc, int8, shared, static", "both")
@pytest.mark.parametrize("method", quick(QUICK, among=METHODS))
def test_on_the_cpu_it_computes_what_its_graph_says_in_fused_products(export, method):
    fields = METHODS[method]
    exported = export("llama_bias", fields, "cpu")
    assert_agree(exported, MASK, flips=0 if method in EXACT else 0.03, step=0.03)

    entries, lorc = exported.manifest.linears, fields.get("lorc")
    graph, kernel = optimized_graph(exported.folder, exported.manifest), base_kernel(fields["scheme"], "cpu")
    assert unfused(graph, entries) == []
    assert {entry.kernel for entry in entries} == {kernel}
    counts, expected = graph.op_counts(), Counter({kernel: values_of(exported)})
    expected["MatMulNBits"] += parts_of(exported, lorc)
    assert Counter(exported.products().values()) == +expected
    assert {name: counts[name] for name in expected} == expected
    factors = 2 * len(entries) if lorc is not None and lorc.factors == "float" else 0
    # What is left in float is what was asked for: two products of each low-rank branch, one of each float path.
    assert counts["MatMul"] == factors + len(buffers(exported, "outlier_weight"))
    assert not {"Gemm", "FusedMatMul"} & set(counts)


@pytest.mark.by_default("lorc, int8, shared", "both")
@pytest.mark.parametrize("method", ["lorc", "lorc, int8, shared", "lorc, w8a8", "llm_int8, static", "both"])
def test_the_cuda_graph_computes_what_it_says(export, method):
    fields = METHODS[method]
    exported = export("llama_bias", fields, "cuda", single=True)
    assert_agree(exported, MASK, flips=0.05 if "a8" in fields["scheme"] else 0, step=0.03)


@pytest.mark.by_default("lorc, int8, shared", "both")
@pytest.mark.parametrize("method", ["lorc", "lorc, int8, shared", "lorc, int8, shared, static", "llm_int8", "both"])
def test_every_node_is_on_cuda(export, cuda_placement, method):
    fields = METHODS[method]
    exported = export("llama_bias", fields, "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    ops, kernel = Counter(placed["optimized_ops"]), base_kernel(fields["scheme"], "cuda")
    expected = Counter({kernel: values_of(exported)}) + Counter({"MatMulNBits": parts_of(exported, fields.get("lorc"))})
    assert {name: ops[name] for name in expected} == expected
    # One quantization for each value that linears share, branches or not.
    assert ops["QuantizeLinear"] == (values_of(exported) if "a8" in fields["scheme"] else 0)


@pytest.mark.by_default("lorc")
@pytest.mark.parametrize("method", ["lorc", "both"])
def test_float16_of_the_cuda_file_adds_what_float16_adds(export, method):
    half, single = (export("llama", METHODS[method], "cuda", single) for single in (False, True))
    assert_float16_adds_little(half, single, MASK)


def test_outliers_are_some_features_of_some_values(export):
    """Otherwise the tests above are of something else."""
    exported = export("llama_bias", METHODS["llm_int8"], "cpu")
    index = buffers(exported, "outlier_index")
    assert 0 < len(index) <= values_of(exported)
    for name, columns in index.items():
        mask = buffers(exported, name.rpartition(".")[0] + ".outlier_mask").popitem()[1]
        assert 0 < len(columns) < len(mask) and float(mask.sum()) == len(mask) - len(columns)


def test_the_output_of_a_linear_is_the_sum(export):
    exported = export("llama_bias", METHODS["both"], "cpu")
    model = exports.onnx.load(exported.folder / "model.onnx", load_external_data=False)
    producers = {output: node for node in model.graph.node for output in node.output}
    for entry in exported.manifest.linears:
        if entry.output == "logits":
            continue
        total = producers[entry.output]
        assert total.op_type == "Add"
        outermost = producers[total.input[1]]
        assert outermost.op_type == "MatMul"
        assert "lorc_up" in outermost.input[1] or outermost.name == f"{entry.node}.lorc_up"


def test_the_bytes_of_a_branch_count_for_its_linear(export):
    plain = export("llama", dict(scheme="w4a16_g32"), "cpu")
    before = {entry.name: entry.bytes for entry in plain.manifest.linears}
    for fields, size in ((METHODS["lorc"], lambda n, k: 4 * 4 * (n + k)),
                         (METHODS["lorc, int8"], lambda n, k: 4 * (n + k) + 4 * (n + 4))):  # fmt: skip
        exported = export("llama", fields, "cpu")
        for entry in exported.manifest.linears:
            assert entry.bytes - before[entry.name] == size(*entry.shape)


def test_the_deployed_model_is_closer_to_float_with_a_branch(export):
    found = []
    for lorc in (None, section("lorc", rank=16, factors="int8")):
        exported = export("llama", dict(scheme="w4a16_g32", lorc=lorc), "cpu")
        float_model = captured_runner(load_weights(exported.captured))
        runs = (float_model, exported.in_onnxruntime())
        want, got = logits(MASK, *((run, exported.captured, torch.float32) for run in runs))
        found.append(sqnr_db(want, got))
    assert found[1] > found[0] + 1
