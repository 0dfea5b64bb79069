"""Linears that read one value are one product: the same numbers in fewer nodes, and the manifest says where they are.

Merged exports are compared with exports of the same model whose products were left alone. Where the kernel rounds its
input a token may differ by a code (see test_agreement.py); everything else is equal to rounding.
"""

import json
from collections import Counter
from unittest.mock import patch

import onnx
import pytest
import torch
from torch import nn

from helpers import exports
from helpers.agreement import ROUNDING, assert_agree
from helpers.breadth import quick
from helpers.pass_runs import block_of, collecting
from helpers.runners import padded, prompt_feeds, tokens
from qexport.api.stages import lowering
from qexport.api.validating import validate
from qexport.artifact.manifest import CPU
from qexport.graph.edit import attributes, call, get_tensor, is_call, shape_of
from qexport.graph.sites import linears
from qexport.lower import blocks
from qexport.lower.fuse_parallel_linears import Merged, joint_name, merge
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Pipeline
from qexport.passes.branches.lorc import LoRC
from qexport.passes.insert_qdq import add_branch, result_of
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import open_session, optimized_graph, unfused

aten = torch.ops.aten
MASK = padded([9, 4, 6], "left")
PLANES = section("crossquant", row_scale="paper", round_weights="before_fold", explicit=True)
PLAIN = ["w4a16_g32", "w4a16_g32_asym", "w8a8_dyn", "w8a8_static", "w4a8_g32", "w8a16_pc"]
CASES = {scheme: dict(scheme=scheme) for scheme in PLAIN} | {
    "lorc": dict(scheme="w4a16_g32", lorc=section("lorc", rank=4)),
    "lorc, int8": dict(scheme="w4a16_g32", lorc=section("lorc", rank=4, factors="int8")),
    "lorc, shared": dict(scheme="w8a8_static", lorc=section("lorc", rank=6, shared=True)),
    "lorc, int8, shared": dict(scheme="w4a16_g32", lorc=section("lorc", rank=6, factors="int8", shared=True)),
    "outliers": dict(scheme="w8a8_dyn", llm_int8=section("llm_int8", threshold=4.0)),
    "two planes": dict(scheme="w8a8_dyn", crossquant=PLANES),
}
QUICK = ("w4a16_g32", "w8a8_static", "lorc", "lorc, int8, shared", "outliers", "two planes")
TOGETHER = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")


def recipe_of(**fields):
    return Recipe(calibration=CalibrationSpec(source="random", samples=4, sequence_length=16), **fields)


def unmerged():
    """While it lasts, exports leave products alone."""
    return patch.object(blocks, "merge", lambda module: Merged())


@pytest.fixture
def export(new_export):
    return lambda family, fields, target="cpu", single=False: new_export(family, recipe_of(**fields), target, single)


def results(exported, feeds):
    """What every linear makes, by name, as the manifest says where it is."""
    entries = exported.manifest.linears
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    names = list(dict.fromkeys(entry.output for entry in entries))
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    path = exported.folder / "with_results.onnx"
    onnx.save(model, path)
    session = open_session(path, exported.manifest, threads=1, provider=CPU)
    wanted = {value.name for value in session.get_inputs()}
    arrays = session.run(names, {name: t.numpy() for name, t in feeds.items() if name in wanted})
    values = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
    return {e.name: values[e.output][..., slice(*(e.columns or (None,)))] for e in entries}


def assert_equal_results(merged, plain, feeds, flips):
    ours, theirs = results(merged, feeds), results(plain, feeds)
    assert set(ours) == set(theirs)
    for entry in merged.manifest.linears:
        got, want = ours[entry.name], theirs[entry.name]
        assert got.shape == want.shape and got.shape[-1] == entry.shape[0]
        different = (got - want).abs().amax(-1) / want.abs().max()
        assert (different > ROUNDING).float().mean() <= flips and different.max() < 0.05


@pytest.mark.by_default("w4a16_g32", "outliers", "lorc, int8, shared")
@pytest.mark.parametrize("case", quick(QUICK, among=CASES))
def test_a_merged_file_has_fewer_products_and_the_same_numbers(export, case):
    fields = CASES[case]
    merged = export("llama_bias", fields)
    with unmerged():
        plain = export("llama_bias", fields)
    entries = merged.manifest.linears
    assert Counter(entry.node for entry in entries) == {
        f"model.layers.{i}.{name}": name.count("+") + 1 for i in range(2) for name in TOGETHER
    }
    assert all((entry.columns is None) == ("+" not in entry.node) for entry in entries)
    assert [e.columns for e in entries[:3]] == [(0, 64), (64, 96), (96, 128)]

    graph, before = (optimized_graph(e.folder, e.manifest) for e in (merged, plain))
    assert unfused(graph, entries) == [] and len(plain.manifest.linears) == len(entries) == 14
    kernel, planes = entries[0].kernel, 2 if case == "two planes" else 1
    for exported, counts, products in ((merged, graph.op_counts(), 8), (plain, before.op_counts(), 14)):
        branches = {part for entry in exported.manifest.linears for part in entry.parts if "lorc" in part[0]}
        assert counts[kernel] == products * planes + len(branches)
        assert len(exported.products()) == products * planes + len(branches)
    # Only gate and up are split: attention takes q, k and v as they come.
    assert graph.op_counts()["Split"] == before.op_counts()["Split"] + 2
    attentions = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2 and all(node.inputs[1:3] == ("", "") for node in attentions)

    feeds = prompt_feeds(merged.captured, tokens(*MASK.shape), MASK)
    assert_equal_results(merged, plain, feeds, flips=0.03)
    assert sum(e.bytes for e in entries) == sum(e.bytes for e in plain.manifest.linears)
    assert merged.manifest.bytes["quantized_linears"] == plain.manifest.bytes["quantized_linears"]


@pytest.mark.by_default("w4a16_g32_asym-*", "w8a8_static-*", "lorc, int8-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("case", ["w4a16_g32_asym", "w8a8_static", "w8a16_pc", "lorc, int8", "lorc, shared"])
def test_the_file_computes_what_its_graph_says(export, case, target):
    exported = export("llama_bias" if "lorc" in case else "llama", CASES[case], target, single=target == "cuda")
    assert_agree(exported, MASK, flips=0.03, step=0.03)
    splits = [n for b in exported.blocks for n in b.module.graph.nodes if is_call(n, aten.split_with_sizes.default)]
    assert len(splits) == 4


def test_without_biases_and_rounding_of_inputs_results_are_equal(export):
    merged = export("llama", dict(scheme="w4a16_g32", accuracy_level=1))
    with unmerged():
        plain = export("llama", dict(scheme="w4a16_g32", accuracy_level=1))
    assert_equal_results(merged, plain, prompt_feeds(merged.captured, tokens(*MASK.shape), MASK), flips=0)


def test_validation_finds_the_same_rows(export):
    fields = dict(scheme="w4a16_g32", accuracy_level=1)
    merged = export("llama_bias", fields)
    with unmerged():
        plain = export("llama_bias", fields)
    ours, theirs = (validate(e.folder, e.captured, windows=1, window=32) for e in (merged, plain))
    assert ours.problems == theirs.problems == () and not ours.layers.moved
    assert ours.placement.kernels == theirs.placement.kernels == {"MatMulNBits": 14}
    for kind in ("linears", "blocks"):
        for got, want in zip(getattr(ours.layers, kind), getattr(theirs.layers, kind), strict=True):
            assert got.name == want.name and got.rescaled == want.rescaled
            for measure in ("sqnr_db", "own_sqnr_db", "cosine"):
                assert getattr(got, measure) == pytest.approx(getattr(want, measure), abs=1e-3), (got.name, measure)


def test_linears_of_other_schemes_stay_apart(export):
    fields = dict(
        scheme="w4a16_g32",
        overrides=[
            Override(match="*.k_proj", scheme="w8a16_g32"), Override(match="*.up_proj", scheme="nf4"),
            Override(match="model.layers.1.*.v_proj", scheme="w4a8_g32"),
        ],
    )  # fmt: skip
    exported = export("llama_bias", fields)
    nodes = {entry.name: entry.node for entry in exported.manifest.linears}
    assert nodes["model.layers.0.self_attn.v_proj"] == "model.layers.0.self_attn.q_proj+v_proj"
    alone = [name for name, node in nodes.items() if name == node]
    apart = json.loads((exported.folder / "report.json").read_text())["export"]["apart"]
    why = {row["linear"]: row["reason"] for row in apart}
    assert why["model.layers.0.self_attn.k_proj"] == "no other linear that reads the same value has its form"
    assert why["model.layers.0.mlp.up_proj"] == "its codes are indices of a table"
    # v of the second layer reads what nobody else reads: the rounded input.
    assert set(alone) - set(why) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    } | {"model.layers.1.self_attn.v_proj"}
    assert_agree(exported, MASK, flips=0.03)


def test_tensors_are_joined_only_while_the_file_is_written(captured, tmp_path):
    lower_blocks, large = lowering.lower_blocks, []

    def watched(graph, finished, target):
        lowered = lower_blocks(graph, finished, target)
        for block in lowered.graphs:
            names = [name for name in attributes(block.module.graph) if not name.startswith("rotary.")]
            tensors = [get_tensor(block.module, name) for name in names]
            large.extend(t.shape for t in tensors if t.device.type != "meta" and t.numel() > 1)
        return lowered

    with patch.object(lowering, "lower_blocks", watched):
        exports.exporting.export(captured("llama_bias"), recipe_of(scheme="w8a8_dyn"), out_dir=tmp_path / "out")
    assert large == []


# ---- in PyTorch -----------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Three linears that read one value, one of them biased; the last result is read before the others exist."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 12, False), nn.Linear(32, 8), nn.Linear(32, 24, False)

    def forward(self, x):
        x = torch.relu(x)
        first = torch.sigmoid(self.a(x)) * 2
        return first, self.b(x), self.c(x)


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))


def rounded(schemes, passes=lambda plan: []):
    """The block of Three, its linears rounded to these schemes."""
    module = block_of(Three(), 32)
    plan = {
        linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse(scheme))
        for linear, scheme in zip(linears(module.graph), schemes, strict=True)
    }
    Pipeline([RoundToNearest(plan), *passes(plan)]).run(module, collecting(X), (X,))
    return module


def products(module):
    return {node.meta["linear"]: node for node in module.graph.nodes if "linear" in node.meta}


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g16_asym", "w8a16_pc", "w4a8", "w8a8_static", "w4a8_g16_int"])
@pytest.mark.parametrize("lorc", [None, dict(), dict(int8=True), dict(shared=True), dict(int8=True, shared=True)])
def test_results_are_what_they_were(scheme, lorc):
    module = rounded(
        [scheme] * 3,
        lambda plan: [*([] if lorc is None else [LoRC(plan, rank=3, **lorc)]), QuantizeActivations(plan)],
    )
    before = module(X)
    found = merge(module)
    assert found.apart == {} and all(name.startswith("a+b+c.") for name in found.joined)
    for got, want in zip(module(X), before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    product = products(module)["a+b+c"]
    assert product.meta["columns"] == {"a": (0, 12), "b": (12, 20), "c": (20, 44)}
    assert shape_of(result_of(module, "a+b+c"))[-1] == 44
    # The bias of b with zeros for the others.
    assert found.joined["a+b+c.bias"].parts == (12, "b.bias", 24)


@pytest.mark.parametrize(
    "schemes, reasons",
    [
        (["w4a16_g32", "w4a16_g16", "w4a16_g32"], {"b": "no other"}),
        (["w4a16_g32", "w4a16_g32_asym", "w8a16_g32"], dict.fromkeys("abc", "no other")),
        (["w8a16_pt"] * 3, dict.fromkeys("abc", "one scale")),
        (["nf4_g32", "w8a16_pc", "w8a16_pc"], {"a": "indices of a table"}),
        (["w8a16_pc", "w4a16_pc", "w8a16_pc"], {"b": "no other"}),
    ],
)
def test_weights_of_another_form_stay_apart(schemes, reasons):
    module = rounded(schemes)
    before = module(X)
    found = merge(module)
    assert set(found.apart) == set(reasons) and all(why in found.apart[name] for name, why in reasons.items())
    assert set(reasons) <= set(products(module))
    for got, want in zip(module(X), before, strict=True):
        torch.testing.assert_close(got, want)


def test_a_linear_without_a_branch_stays_apart_from_those_with_one():
    module = rounded(["w8a16_pc"] * 3)
    product = products(module)["c"]
    with module.graph.inserting_before(product):
        branch = call(module.graph, aten.slice.Tensor, (product.args[0], -1, 0, 24), like=product)
    add_branch(module, "c", branch)
    module.recompile()
    before = module(X)
    assert set(merge(module).apart) == {"c"} and set(products(module)) == {"a+b", "c"}
    for got, want in zip(module(X), before, strict=True):
        torch.testing.assert_close(got, want)


def test_branches_that_read_results_stay_apart():
    """Each of the three adds something, c what is made of a's result: the sum cannot come before the result."""
    module = rounded(["w8a16_pc"] * 3)
    graph = module.graph
    for name, source in (("a", "a"), ("b", "b"), ("c", "a")):
        last = max(result_of(module, name), result_of(module, source))
        size = shape_of(result_of(module, name))[-1]
        with graph.inserting_before(last.next):
            value = result_of(module, source) if name == "c" else products(module)[name].args[0]
            total = call(graph, aten.sum.dim_IntList, (value, [-1], True), like=value, shape=(*shape_of(value)[:-1], 1))
            branch = call(graph, aten.expand.default, (total, [-1, -1, size]), like=result_of(module, name))
        add_branch(module, name, branch)
    module.recompile()
    before = module(X)
    found = merge(module)
    assert set(found.apart) == {"a", "b", "c"} and "reads the result of another" in found.apart["a"]
    assert all(torch.equal(got, want) for got, want in zip(module(X), before, strict=True))


def test_outputs_of_a_module_keep_their_names_and_rows_without_tokens(tmp_path):
    """Two dimensions, results that are outputs of the model, a bias on one of them."""
    x, made = X[:, 0], []
    for change in (unmerged(), patch.object(blocks, "merge", merge)):
        module = nn.Sequential(nn.ReLU(), Pair())
        with change, torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            recipe = recipe_of(scheme="w8a8_static")
            out = tmp_path / str(len(made))
            found = exports.exporting.export(module, recipe, out_dir=out, example_inputs=(x,), calibration=[(x,)])
        session = open_session(found.folder, found.manifest, threads=1)
        assert [value.name for value in session.get_outputs()] == ["output_0", "output_1"]
        made.append(session.run(None, {session.get_inputs()[0].name: x.numpy()}))
        entries, graph = found.manifest.linears, optimized_graph(found.folder, found.manifest)
        assert unfused(graph, entries) == []
        report = validate(found.folder, module, inputs=[(x,)])
        assert not report.problems and all(row.sqnr_db > 25 for row in report.layers.linears)
    assert [entry.columns for entry in entries] == [(0, 24), (24, 64)]
    assert graph.op_counts()["MatMulIntegerToFloat"] == 1
    for got, want in zip(*made, strict=True):
        assert abs(got - want).max() < 1e-5 * abs(want).max()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 24, False), nn.Linear(32, 40)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize(
    "names, joint",
    [
        (["m.0.attn.q", "m.0.attn.k", "m.0.attn.v"], "m.0.attn.q+k+v"),
        (["m.0.attn.q", "m.0.mlp.up"], "m.0.attn.q+mlp.up"),
        (["a", "b.c"], "a+b.c"),
    ],
)
def test_joint_names(names, joint):
    assert joint_name(names) == joint
