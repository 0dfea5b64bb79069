"""A low-rank branch takes rounding's error away, whatever rounded the weight, and reads the float value."""

import numpy
import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of, collecting, plan_of, run_passes, stream_of
from helpers.runners import captured_runner, load_weights, padded, prompt_feeds, tokens
from qexport.errors import PassError
from qexport.graph.edit import get_tensor, is_call, set_tensor
from qexport.graph.sites import by_input, linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Context, PassState, Pipeline
from qexport.passes.branches.lorc import LoRC, deployed_weight, products_of
from qexport.passes.equalization.crossquant import CrossQuant
from qexport.passes.weights.gptq import GPTQ
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan, make_plan
from qexport.quant.formats import Scheme

aten, ops = torch.ops.aten, torch.ops.qexport
IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")
WHOLE = 1000  # a rank that is cut to the smaller side of every weight


def logits(captured):
    return captured_runner(captured)(prompt_feeds(captured, IDS, MASK))["logits"][MASK.bool()]


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def run(captured, passes):
    return run_passes(captured, passes, stream_of(captured, IDS, MASK))


def changed(results, name="LoRC"):
    return {note.site: note for block in results.values() for note in block[name].changed}


def mixed_plan(captured, scheme_for):
    graphs = [(block.name, block.module.graph) for block in captured.blocks]
    return {plan.name: plan for plan in make_plan(graphs, scheme_for)}


def one_block(module, width=16):
    """The graph of a module and a plan function for its linears."""
    graph = block_of(module, width)

    def plan(name):
        return {
            linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse(name))
            for linear in linears(graph.graph)
        }

    return graph, plan


def nothing(module, wanted):
    raise AssertionError("no pass asked for statistics")


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))


class Three(nn.Module):
    """Three linears that read one value, one of them biased."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 12, False), nn.Linear(16, 8), nn.Linear(16, 24, False)

    def forward(self, x):
        x = torch.relu(x)
        return self.a(x), self.b(x), self.c(x)


ROUNDING = {
    "groups": ("w4a16_g16", lambda plan: [RoundToNearest(plan)]),
    "zero points": ("w4a16_g32_asym", lambda plan: [RoundToNearest(plan)]),
    "channels": ("w4a8", lambda plan: [RoundToNearest(plan)]),
    "one scale": ("w8a8_pt_dyn", lambda plan: [RoundToNearest(plan)]),
    "expanded codes": ("w4a8_g32_int", lambda plan: [RoundToNearest(plan)]),
    "two planes": ("w8a8_dyn", lambda plan: [CrossQuant(plan, round_before_fold=True), RoundToNearest(plan)]),
    "a codebook": ("nf4", lambda plan: [RoundToNearest(plan)]),
    "gptq": ("w4a16_g32", lambda plan: [GPTQ(plan)]),
}


@pytest.mark.by_default("gptq-*", "two planes-*", "channels-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scheme, rounding", ROUNDING.values(), ids=ROUNDING)
def test_full_rank_gives_the_float_model_back(captured, scheme, rounding, shared):
    want = logits(load_weights(captured("llama")))
    rounded, corrected = (load_weights(captured("llama")) for _ in range(2))
    plan = plan_of(rounded, scheme)
    run(rounded, rounding(plan))
    results = run(corrected, [*rounding(plan), LoRC(plan, WHOLE, shared=shared)])
    assert distance(logits(corrected), want) < 1e-5
    assert distance(logits(rounded), want) > 1e-3  # there was something to give back
    assert all(note.data["error removed"] > 1 - 1e-9 for note in changed(results).values())


@pytest.mark.by_default("GPTQ")
@pytest.mark.parametrize("rounding", [RoundToNearest, GPTQ])
def test_more_rank_comes_closer(captured, rounding):
    want, found = logits(load_weights(captured("llama_bias"))), []
    for rank in (0, 4, 16, 48):
        model = load_weights(captured("llama_bias"))
        plan = plan_of(model, "w4a16_g32")
        run(model, [rounding(plan), *([LoRC(plan, rank)] if rank else [])])
        found.append(distance(logits(model), want))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


def test_the_branch_is_the_best_one_for_the_codes_that_are_deployed():
    graph, plan = one_block(Three())
    weights = {linear.name: get_tensor(graph, linear.weight).clone() for linear in linears(graph.graph)}
    plan = plan("w4a16_g16")
    results = Pipeline([RoundToNearest(plan), LoRC(plan, 3)]).run(graph, nothing)
    notes = {note.site: note for note in results["LoRC"].changed}
    assert list(notes) == ["a", "b", "c"]
    for name, products in products_of(graph, plan).items():
        rounded = plan[name].scheme.weight.round_to_nearest(weights[name]).dequantize()
        assert torch.equal(deployed_weight(graph, products), rounded)
        error = (weights[name] - rounded).double().numpy()
        u, s, v = numpy.linalg.svd(error, full_matrices=False)
        down, up = (graph.get_buffer(f"{name}.lorc_{end}") for end in ("down", "up"))
        assert numpy.allclose((down @ up).t(), u[:, :3] * s[:3] @ v[:3], atol=1e-6)
        assert notes[name].data["rank"] == 3
        assert notes[name].data["error removed"] == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), abs=1e-5)


def test_the_result_is_the_sum_and_what_is_read_is_it():
    graph, plan = one_block(Three())
    plan = plan("w4a8")
    Pipeline([RoundToNearest(plan), LoRC(plan, 2)]).run(graph, nothing)
    output = graph.graph.output_node().args[0]
    for name, read in zip("abc", output, strict=True):
        (result,) = (node for node in graph.graph.nodes if node.meta.get("result_of") == name)
        assert result is read and is_call(result, aten.add.Tensor)
        base, branch = result.args
        assert is_call(base, aten.add.Tensor if name == "b" else aten.matmul.default)
        assert branch.args[1].target == f"{name}.lorc_up"


@pytest.mark.parametrize("int8", [False, True])
def test_the_branch_reads_what_was_not_quantized(captured, int8):
    model = load_weights(captured("llama"))
    plan = plan_of(model, "w8a8_dyn")
    values = {linear.name: linear.input.name for block in model.blocks for linear in linears(block.module.graph)}
    run(model, [RoundToNearest(plan), LoRC(plan, 4, int8), QuantizeActivations(plan)])
    for block in model.blocks:
        for name, (product,) in products_of(block.module, plan).items():
            (down,) = (n for n in block.module.graph.nodes if _weight(n).startswith(f"{name}.lorc_down"))
            assert down.args[0].name == values[name] != product.args[0].name


def _weight(node):
    if not is_call(node, aten.matmul.default):
        return ""
    weight = node.args[1]
    return str((weight if weight.op == "get_attr" else weight.args[0]).target)


def test_int8_factors_cost_little_and_say_what_they_belong_to(captured):
    want = logits(load_weights(captured("llama")))
    got = {}
    for int8 in (False, True):
        model = load_weights(captured("llama"))
        plan = plan_of(model, "w4a16_g32")
        results = run(model, [RoundToNearest(plan), LoRC(plan, 8, int8)])
        got[int8] = distance(logits(model), want), model, changed(results)
    (floats, _, exact), (integers, model, rounded) = got[False], got[True]
    assert integers < 1.02 * floats
    for name, note in rounded.items():
        assert note.data["error removed"] == pytest.approx(exact[name].data["error removed"], abs=1e-2)
        assert note.data["factors"] == "int8" and exact[name].data["factors"] == "float"
    for block in model.blocks:
        products = [node for node in block.module.graph.nodes if "branch_of" in node.meta]
        names = products_of(block.module, plan)
        assert sorted(node.meta["linear"] for node in products) == sorted(
            f"{name}.lorc_{end}" for name in names for end in ("down", "up")
        )
        for node in products:
            assert node.meta["linear"].rpartition(".")[0] == node.meta["branch_of"]
            codes, scale, zero_point, *form = node.args[1].args
            assert form == [1, 0, 8] and zero_point is None
            codes, scale = (get_tensor(block.module, part.target) for part in (codes, scale))
            assert codes.dtype == torch.int8 and scale.shape == (codes.shape[1],)


@pytest.mark.parametrize("int8", [False, True])
def test_linears_of_one_value_share_a_factor(captured, int8):
    models = {}
    for shared in (False, True):
        model = load_weights(captured("llama"))
        plan = plan_of(model, "w4a16_g32")
        values = [len(by_input(linears(block.module.graph))) for block in model.blocks]
        results = run(model, [RoundToNearest(plan), LoRC(plan, 6, int8, shared)])
        models[shared] = model, changed(results)
        for block, number in zip(model.blocks, values, strict=True):
            downs = [node for node in block.module.graph.nodes if ".lorc_down" in _weight(node)]
            assert len(downs) == (number if shared else len(products_of(block.module, plan)))
    model, notes = models[True]
    gate = "model.layers.0.mlp.gate_proj"
    assert notes[gate].data["shares with"] == ["model.layers.0.mlp.up_proj"]
    assert "shares with" not in notes["model.layers.0.mlp.down_proj"].data
    assert notes["model.layers.0.mlp.down_proj"].data == models[False][1]["model.layers.0.mlp.down_proj"].data
    for name, note in notes.items():  # the same rank now serves several
        assert note.data["error removed"] <= models[False][1][name].data["error removed"] + 1e-3


def test_a_shared_factor_is_the_best_one_for_all_of_them_together():
    graph, plan = one_block(Three())
    weights = {linear.name: get_tensor(graph, linear.weight).clone() for linear in linears(graph.graph)}
    plan = plan("w4a16_g16")
    Pipeline([RoundToNearest(plan), LoRC(plan, 3, shared=True)]).run(graph, nothing)
    errors = [w - plan[name].scheme.weight.round_to_nearest(w).dequantize() for name, w in weights.items()]
    u, s, v = numpy.linalg.svd(torch.cat(errors).double().numpy(), full_matrices=False)
    ups = [graph.get_buffer(f"{name}.lorc_up") for name in "abc"]
    together = graph.get_buffer("a.lorc_down") @ torch.cat(ups, 1)
    assert numpy.allclose(together.t(), u[:, :3] * s[:3] @ v[:3], atol=1e-6)


def test_linears_with_quantized_inputs_do_not_share_with_others(captured):
    model = load_weights(captured("llama"))
    plan = mixed_plan(model, lambda name: Scheme.parse("w4a16_g32" if name.endswith("k_proj") else "w4a8_g32"))
    notes = changed(run(model, [RoundToNearest(plan), LoRC(plan, 4, shared=True)]))
    assert notes["model.layers.0.self_attn.q_proj"].data["shares with"] == ["model.layers.0.self_attn.v_proj"]
    assert "shares with" not in notes["model.layers.0.self_attn.k_proj"].data


class Uneven(nn.Module):
    """Two features of the linear's input are a hundred times the others."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 12, False)

    def forward(self, x):
        size = torch.ones(16)
        size[3], size[9] = 100.0, 50.0
        return self.a(x * size)


collect = collecting(X)


def test_weights_put_the_rank_where_inputs_are_large():
    want, found = None, {}
    for weighted in (False, True):
        graph, plan = one_block(Uneven())
        want = graph(X)[0] if want is None else want
        plan = plan("w4a16_g16")
        results = Pipeline([RoundToNearest(plan), LoRC(plan, 2, weighted=weighted)]).run(graph, collect)
        found[weighted] = distance(graph(X)[0], want), results["LoRC"].changed[0].data["error removed"]
    assert found[True][0] < 0.2 * found[False][0]
    assert found[True][1] < found[False][1]  # of the weight itself the other one is the best


def test_float_linears_have_no_branch_and_the_plan_says_why(captured):
    model = load_weights(captured("llama"))
    plan = mixed_plan(model, lambda name: None if "down_proj" in name else Scheme.parse("w4a16_g32"))
    results = run(model, [RoundToNearest(plan), LoRC(plan, 4)])
    skipped = {note.site: note.what for block in results.values() for note in block["LoRC"].skipped}
    assert skipped == {f"model.layers.{i}.mlp.down_proj": "kept in float by the recipe" for i in (0, 1)}
    assert len(changed(results)) == 13


def test_weights_on_the_grid_need_no_branch():
    graph, plan = one_block(Three())
    for linear in linears(graph.graph):
        codes = torch.randint(-7, 8, linear.shape, generator=torch.Generator().manual_seed(1)).float()
        codes[:, 0] = 7
        set_tensor(graph, linear.weight, codes)
    plan = plan("w4a16_g16")
    results = Pipeline([RoundToNearest(plan), LoRC(plan, 4, shared=True)]).run(graph, nothing)
    assert not results["LoRC"].changed
    assert [note.what for note in results["LoRC"].skipped] == ["rounding left no error"] * 3
    assert not any("branch_of" in node.meta for node in graph.graph.nodes)


def test_weights_must_be_rounded_first_and_kept():
    graph, plan = one_block(Three())
    plan = plan("w4a16_g16")
    with pytest.raises(PassError, match="a is not rounded yet"):
        Pipeline([LoRC(plan)]).run(graph, nothing)
    Pipeline([RoundToNearest(plan)]).run(graph, nothing)
    with pytest.raises(PassError, match="weight of a was not kept"):
        LoRC(plan).call(graph, Context(handover=PassState()))
