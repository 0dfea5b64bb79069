"""Mixtures of experts in one node each: found by dataflow, the same numbers, and the reason where one stays dense."""

import json
import re
from collections import Counter
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.agreement import assert_agree, assert_float16_adds_little
from helpers.breadth import quick
from helpers.cuda_placement.models import CPU, CUDA, PROMPT
from helpers.random_decoders import save_model
from helpers.runners import padded
from qexport.api.stages.capturing import capture_model
from qexport.graph.edit import get_tensor, is_call
from qexport.graph.schema import bind
from qexport.graph.sites import linears
from qexport.lower.fuse_moe import gather_experts
from qexport.lower.match_gated_activation import gate_of
from qexport.lower.moe_form import Gate
from qexport.lower.routing_weights import never_negative, sum_of
from qexport.plan.model_plan import plan_for
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import optimized_graph, unfused
from qexport.targets.kernels.predict_kernels import slow_linears

aten = torch.ops.aten


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


MASK = padded([9, 4, 6], "left")
OTHERS = ["phimoe", *map(slow, ["granitemoe", "qwen2_moe", "olmoe", "ernie4_5_moe", "glm4_moe"])]
SIZES = {"Cast", "Concat"}  # arithmetic of lengths, as in every decoder
EXPERT = "model.layers.0.mlp.experts"


def recipe_of(scheme="w4a16_g32", **fields):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(scheme=scheme, **{"weights": {"method": "rtn"}, "calibration": calibration} | fields)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Captured models whose widths CUDA's kernel takes, made once: wide(family)."""
    once = cache(lambda family: exports.capture(save_model(family, tmp_path_factory.mktemp(family), **WIDTHS)))
    return lambda family: once(family).copy()


WIDTHS = dict(intermediate_size=64, moe_intermediate_size=64)


def counts(exported):
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def reasons(exported):
    """Why mixtures are dense, by their path."""
    listed = json.loads((exported.folder / "report.json").read_text())["export"]["dense"]
    return {entry["linear"]: entry["reason"] for entry in listed}


@pytest.mark.by_default("mixtral-w4a16_g32", "gpt_oss-w4a16_g32")
@pytest.mark.parametrize(
    ("family", "scheme"),
    [("mixtral", "w4a16_g32"), ("mixtral", "w3a16_g32"), ("qwen3_moe", "w4a16_g32"), ("gpt_oss", "w4a16_g32"),
     slow("mixtral", "w8a16_g32"), slow("mixtral", "w4a16_g32_asym"), slow("qwen3_moe", "w8a16_g32"),
     slow("gpt_oss", "w8a16_g32"), slow("gpt_oss", "w4a16_g32_asym")],
)  # fmt: skip
def test_onnxruntime_agrees_with_the_graph_in_prefill_and_decoding(export, family, scheme):
    exported = export(family, recipe_of(scheme))
    assert counts(exported)["QMoE"] == 2 and not reasons(exported)
    assert_agree(exported, MASK, flips=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("normed", [False, True])
def test_shares_are_those_of_the_model_whether_it_norms_them_or_not(tmp_path, normed):
    """Left to the node they would not be normed on the CPU, whatever its attribute says."""
    captured = capture_model(save_model("qwen3_moe", tmp_path / "model", norm_topk_prob=normed, **WIDTHS))
    exported = agreement.export(captured, recipe_of(accuracy_level=1), "cpu", tmp_path / "out")
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    mixtures = [node for node in graph.node if node.op_type == "QMoE"]
    assert len(mixtures) == 2 and all(node.input[14] for node in mixtures)
    assert_agree(exported, MASK, flips=0)


@pytest.mark.parametrize("family", OTHERS)
def test_other_routers_and_experts_beside_them(export, family):
    exported = export(family, recipe_of(accuracy_level=1))
    mixtures = 1 if family == "glm4_moe" else 2
    assert counts(exported)["QMoE"] == mixtures and not reasons(exported)
    assert_agree(exported, MASK, flips=0)


def test_nothing_of_an_expert_is_left_in_what_onnxruntime_runs(export):
    exported = export("mixtral", recipe_of())
    graph, manifest = optimized_graph(exported.folder, exported.manifest), exported.manifest
    found = Counter(node.op_type for node in graph.nodes)
    assert found["QMoE"] == 2 and found["MatMulNBits"] == 2 * 2  # q, k and v in one, and o
    assert not unfused(graph, manifest.linears)
    inside = [entry for entry in manifest.linears if "experts" in entry.name]
    assert len(inside) == 2 * 4 * 2 and set(manifest.readable).isdisjoint(inside)
    assert {(e.kernel, e.output, e.columns, e.node) for e in inside} == {
        ("QMoE", "", None, f"model.layers.{layer}.mlp.experts") for layer in (0, 1)
    }
    # Codes of half a byte, and a scale of four bytes for 32 of them.
    assert all(entry.bytes == entry.shape[0] * entry.shape[1] * (1 / 2 + 4 / 32) for entry in inside)
    assert manifest.bytes["quantized_linears"] == sum(entry.bytes for entry in manifest.linears)


def test_an_expert_that_is_gone_is_missed(export):
    exported = export("mixtral", recipe_of())
    entries = [e.model_copy(update={"node": "elsewhere"}) for e in exported.manifest.linears if not e.output]
    graph = optimized_graph(exported.folder, exported.manifest)
    assert [found for _, found in unfused(graph, entries)] == [None] * len(entries)


DENSE = {
    "two schemes": (
        dict(overrides=(Override(match=f"{EXPERT}.2.down_proj", scheme="w8a16_g32"),)),
        "several kinds: 4 bits in groups of 32 and 8 bits in groups of 32",
    ),
    "one of them float": (dict(overrides=(Override(match=f"{EXPERT}.1.*", scheme="float"),)), "are float"),
    "up and down apart": (
        dict(overrides=(Override(match="*.down_proj", scheme="w8a16_g32"),)), "weights of 4 bits .* and of 8 bits",
    ),
    "two bits": (dict(scheme="w2a16_g32"), "have 2 bits"),
    "a table": (dict(scheme="nf4_g32"), "weights are not codes in groups"),
    "float input kept for 8 bits": (dict(scheme="w8a16_g32", accuracy_level=1), "accuracy level 1 keeps it float"),
    "rounded inputs": (dict(scheme="w8a8_dyn"), "rounded"),
    "rounded inputs in groups": (dict(scheme="w4a8_g32"), "rounded"),
    "static inputs": (dict(scheme="w8a8_static"), "rounded"),
    "branches": (dict(lorc=section("lorc", rank=4)), "more than a bias"),
    "factors": (dict(smooth=section("smooth", method="awq", explicit=True)), "scaled"),
    "planes": (
        dict(scheme="w8a8_dyn", crossquant=section("crossquant", row_scale="paper", round_weights="before_fold")),
        "rounded",
    ),
}  # fmt: skip


QUICK = ("two schemes", "branches", "rounded inputs")


@pytest.mark.parametrize("name", quick(QUICK, among=DENSE))
def test_what_stands_in_the_way_is_said_and_the_dense_form_stays(export, name):
    fields, reason = DENSE[name]
    exported = export("mixtral", recipe_of(**fields))
    found = reasons(exported)
    assert EXPERT in found and re.search(reason, found[EXPERT]), found
    assert counts(exported)["QMoE"] == 2 - len(found)
    assert_agree(exported, MASK, flips=0.05)


def test_a_mixture_of_its_own_scheme_is_one_node_beside_others(export):
    exported = export("mixtral", recipe_of(overrides=(Override(match=f"{EXPERT}.*", scheme="w4a16_g16_asym"),)))
    assert counts(exported)["QMoE"] == 2 and not reasons(exported)
    assert_agree(exported, MASK, flips=0.02)


def test_prompts_and_steps_share_the_weights_of_experts(export):
    exported = export("mixtral", recipe_of(prefill="int8"))
    inside = [entry for entry in exported.manifest.linears if "experts" in entry.name]
    assert {(entry.kernel, entry.prompt_kernel) for entry in inside} == {("QMoE", "QMoE")}
    assert not unfused(optimized_graph(exported.folder, exported.manifest), exported.manifest.linears)
    names = [t.name for t in onnx.load(exported.folder / "model.onnx", load_external_data=False).graph.initializer]
    assert sum("experts" in name for name in names) == 2 * 4  # codes and scales of two sides, for two layers


# ---- CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("mixtral-w4a16_g32-float16")
@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [("mixtral", "w4a16_g32", "float16"), ("mixtral", "w4a16_g32", "bfloat16"), slow("mixtral", "w8a16_g64", "float16"),
     slow("mixtral", "w4a16_g32_asym", "float16"), slow("gpt_oss", "w4a16_g32", "float16"),
     slow("olmoe", "w4a16_g32", "float16")],
)  # fmt: skip
def test_cuda_computes_mixtures_and_nothing_falls_back(wide, cuda_placement, tmp_path, family, scheme, dtype):
    exported = agreement.export(wide(family), recipe_of(scheme), "cuda", tmp_path / "out", dtype=dtype)
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0 and set(placed["nodes"].get(CPU, ())) <= SIZES
    assert placed["nodes"][CUDA]["QMoE"] == 2 and not reasons(exported)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g16"])
def test_what_is_foretold_of_cuda_is_what_the_manifest_says(wide, tmp_path, scheme):
    model, recipe = wide("mixtral"), recipe_of(scheme)
    plan, _ = plan_for(model, recipe, 2)
    foretold = slow_linears([block.module.graph for block in model.blocks], {p.name: p for p in plan})
    manifest = agreement.export(wide("mixtral"), recipe, "cuda", tmp_path / "out").manifest
    assert foretold == {entry.name: entry.slow for entry in manifest.linears if entry.fast is not None}
    assert any("experts" in name for name in foretold) == (scheme == "w4a16_g16")


@pytest.mark.by_default("changes0-*")
@pytest.mark.parametrize(
    ("changes", "scheme", "reason"),
    [({}, "w4a16_g16", "takes groups of 32, 64, 128, not of 16"), (dict(intermediate_size=96), "w4a16_g32", "of 64")],
)
def test_what_cudas_kernel_does_not_take_stays_dense(tmp_path, changes, scheme, reason):
    model = capture_model(save_model("mixtral", tmp_path / "model", **WIDTHS | changes))
    exported = agreement.export(model, recipe_of(scheme), "cuda", tmp_path / "out")
    assert len(reasons(exported)) == 2 and all(reason in why for why in reasons(exported).values())


@pytest.mark.by_default("False")
@pytest.mark.parametrize("normed", [False, True])
def test_shares_on_cuda_are_those_of_the_model_too(tmp_path, normed):
    """That node reads scores, and what it makes of them is normed: where shares are not, their sum is a factor."""
    captured = capture_model(save_model("qwen3_moe", tmp_path / "model", norm_topk_prob=normed, **WIDTHS))
    single = agreement.export(captured, recipe_of(), "cuda", tmp_path / "out", single=True)
    graph = onnx.load(single.folder / "model.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    mixtures = [node for node in graph.node if node.op_type == "QMoE"]
    assert len(mixtures) == 2 and not reasons(single)
    for node in mixtures:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        # k = 2, and every other expert has a score of log(1e-30): normed among the chosen or all, the softmax is one.
        assert attributes["k"] == 2 and attributes["normalize_routing_weights"] == 0
        assert not any(node.input[14:]) and makers[node.input[1]].op_type == "Log"
        (after,) = [reader for reader in graph.node if node.output[0] in reader.input]
        if normed:
            assert after.op_type != "Mul"
        else:
            (factor,) = set(after.input) - set(node.output)
            assert after.op_type == "Mul" and makers[makers[factor].input[0]].op_type == "ReduceSum"
    assert_agree(single, MASK, flips=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", slow("mixtral"), slow("gpt_oss")])
def test_shares_by_scores_are_the_same_numbers(wide, tmp_path, family):
    """On CUDA's form, which the CPU provider computes here: olmoe's shares do not add up to one."""
    single = agreement.export(wide(family), recipe_of(), "cuda", tmp_path / "single", single=True)
    assert_agree(single, MASK, flips=0)
    half = agreement.export(wide(family), recipe_of(), "cuda", tmp_path / "half")
    assert_float16_adds_little(half, single, MASK)


# ---- reading graphs -------------------------------------------------------------------------------------------------


def shares_of(model):
    nodes = [node for block in model.blocks for node in block.module.graph.nodes]
    return next(node for node in nodes if "expert_shares" in str(node.target))


@pytest.mark.by_default("mixtral-1.0", "gpt_oss-1.0")
@pytest.mark.parametrize(
    ("family", "total"),
    [("mixtral", 1.0), ("gpt_oss", 1.0), ("olmoe", None), slow("granitemoe", 1.0), ("phimoe", None),
     slow("glm4_moe", 1.0)],
)  # fmt: skip
def test_shares_are_not_negative_and_some_add_up_to_one(captured, family, total):
    weights = shares_of(captured(family)).args[1]
    assert never_negative(weights) and sum_of(weights) == total


def test_a_share_that_may_be_negative_is_left_dense(captured):
    model = captured("mixtral")
    shares = shares_of(model)
    graph = shares.graph
    with graph.inserting_before(shares):
        lower = graph.call_function(aten.sub.Tensor, (shares.args[1], 0.1))
    lower.meta = dict(shares.args[1].meta)
    shares.replace_input_with(shares.args[1], lower)
    assert not never_negative(lower)
    (why,) = gather_experts(graph.owning_module, lambda form: "").values()
    assert "below zero" in why


@pytest.mark.parametrize(
    ("family", "gate"),
    [("mixtral", Gate("swiglu")), ("gpt_oss", Gate("swiglu", True, 1.702, 1.0, 7.0)), ("olmoe", Gate("swiglu"))],
)
def test_gates_are_told_from_the_graph(captured, family, gate):
    block = shares_of(captured(family)).graph
    up, down = [linear for linear in linears(block) if f"{EXPERT}.0." in linear.name]
    inner = down.input
    if is_call(inner.args[1], aten.slice.Tensor):  # times the share
        inner = inner.args[0]
    assert gate_of(inner, up.node) == gate
    assert gate_of(up.node, up.node) is None


# ---- experts of small floats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme, kind", [("mxfp4", b"fp4"), ("nvfp4", b"nvfp4")])
@pytest.mark.each_value_once
def test_cuda_computes_experts_of_4_bit_floats(wide, cuda_placement, tmp_path, family, scheme, kind):
    exported = agreement.export(wide(family), recipe_of(scheme), "cuda", tmp_path / "out")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0 and set(placed["nodes"].get(CPU, ())) <= SIZES
    assert placed["nodes"][CUDA]["QMoE"] == 2 and not reasons(exported)
    graph = onnx.load(exported.folder / "model.onnx").graph
    tensors = {t.name: t for t in graph.initializer}
    (node, *_) = [node for node in graph.node if node.op_type == "QMoE"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["quant_type"], attributes["block_size"]) == (kind, 32 if scheme == "mxfp4" else 16)
    mixture = next(n for b in exported.blocks for n in b.module.graph.nodes if "quantized_experts" in str(n.target))
    block = next(b for b in exported.blocks if mixture.graph is b.module.graph)
    given = bind(mixture)
    for side, (codes, scales, whole) in {"up": (2, 3, 15), "down": (5, 6, 16)}.items():
        ours = weights_of(block, *(getattr(given, f"{side}_{part}") for part in ("codes", "scales", "wholes")), scheme)
        if side == "up" and not given.interleaved:  # gate and up, row by row
            ours = ours.view(len(ours), 2, -1, ours.shape[-1]).transpose(1, 2).flatten(1, 2)
        theirs = as_the_schema_says(*(tensors[node.input[place]] for place in (codes, scales, whole)))
        assert (torch.from_numpy(theirs) - ours).abs().max() <= 2**-22 * ours.abs().max()


def weights_of(block, codes, scales, wholes, scheme):
    """[E, N, K] of a mixture in a graph."""
    found = []
    for e in range(len(codes)):
        parts = [codes[e], scales[e], *(wholes[e : e + 1] or [None])]
        tensors = [None if part is None else get_tensor(block.module, part.target) for part in parts]
        found.append(torch.ops.qexport.dequantize_floats(*tensors, scheme).t())
    return torch.stack(found).double()


def as_the_schema_says(codes, scales, whole):
    """In float64: E2M1 numbers, the first of a byte in its low bits, times a block's scale, times an expert's."""
    exponents = scales.data_type == onnx.TensorProto.FLOAT8E8M0
    kind = ml_dtypes.float8_e8m0fnu if exponents else ml_dtypes.float8_e4m3fn
    packed = onnx.numpy_helper.to_array(codes)
    steps = onnx.numpy_helper.to_array(scales).view(kind).astype(float)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate([table, -table])
    values = np.stack([table[packed & 15], table[packed >> 4]], -1).reshape(*packed.shape[:2], -1)
    size = values.shape[-1] // steps.shape[-1]
    return values * steps.repeat(size, -1) * onnx.numpy_helper.to_array(whole).astype(float)[:, None, None]


@pytest.mark.by_default("nvfp4-gpt_oss", "mxfp4-mixtral")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_the_cpu_computes_experts_of_4_bit_floats_as_integers(export, family, scheme):
    exported = export(family, recipe_of(scheme))
    assert counts(exported)["QMoE"] == 2 and not reasons(exported)
    assert_agree(exported, MASK, flips=0.02)
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == []
    experts = [entry for entry in exported.manifest.linears if "experts" in entry.name]
    assert {entry.kernel for entry in experts} == {"QMoE"}
    for entry in experts:  # with its share of the tensors of all
        planned = Scheme.parse(entry.scheme).bytes(entry.shape, 4)
        assert abs(entry.bytes - planned) <= 4 + 4 * entry.shape[0] * (family == "gpt_oss"), entry


@pytest.mark.parametrize("scheme, level, why", [
    ("mxfp4", 1, "rounds what mxfp4 weights, which become 8-bit integers, read"),
    ("w8a16_fp8", 4, "QMoE takes mxfp4 and nvfp4"),
])  # fmt: skip
def test_experts_of_floats_that_stay_dense_on_the_cpu(captured, tmp_path, scheme, level, why):
    exported = agreement.export(captured("mixtral"), recipe_of(scheme, accuracy_level=level), "cpu", tmp_path / "out")
    assert counts(exported)["QMoE"] == 0 and len(reasons(exported)) == 2
    assert all(why in reason for reason in reasons(exported).values())
    assert_agree(exported, MASK, flips=0.02)
