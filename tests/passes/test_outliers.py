"""Features with outliers take a float path, and neither they nor their scale reach the quantized one."""

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of, collecting, plan_of, run_passes, stream_of
from helpers.runners import captured_runner, load_weights, padded, prompt_feeds, tokens
from qexport.graph.edit import get_tensor, is_call
from qexport.graph.sites import linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Context, PassState, Pipeline, RowScale
from qexport.passes.branches.lorc import LoRC
from qexport.passes.branches.outliers import SeparateOutliers
from qexport.passes.weights.gptq import GPTQ
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan, make_plan
from qexport.quant.formats import ActivationFormat, Scheme
from qexport.quant.metrics import sqnr_db

aten, ops = torch.ops.aten, torch.ops.qexport
IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")
LARGE = [2, 7, 11]
PLACES = ["before rounding", "after rounding"]


class Two(nn.Module):
    """Two linears, one biased, that read a value whose features 2, 7 and 11 are large."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 12), nn.Linear(16, 8, False)

    def forward(self, x):
        x = x * 1.0
        return self.a(x), self.b(x)


def inputs(seed=5):
    x = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x[:, :, LARGE] *= 40
    x[0, 0, LARGE] = 40.0
    return x


X = inputs()


collect = collecting(X)


def two(scheme):
    graph = block_of(Two(), 16)
    scheme = Scheme.parse(scheme)
    return graph, {item.name: LinearPlan(item.name, "", item.shape, scheme) for item in linears(graph.graph)}


def placed(place, separate, rounding, *rest):
    return [separate, rounding, *rest] if place == PLACES[0] else [rounding, separate, *rest]


def calls(graph, target):
    return [node for node in graph.graph.nodes if is_call(node, target)]


def logits(captured):
    return captured_runner(captured)(prompt_feeds(captured, IDS, MASK))["logits"][MASK.bool()]


def run(captured, passes):
    return run_passes(captured, passes, stream_of(captured, IDS, MASK))


@pytest.mark.parametrize("place", PLACES)
def test_outliers_meet_float_weights_and_the_rest_rounded_ones(place):
    graph, plan = two("w8a8_dyn")
    weights = {linear.name: get_tensor(graph, linear.weight).clone() for linear in linears(graph.graph)}
    bias = graph.get_buffer("a.bias").clone()
    results = Pipeline(placed(place, SeparateOutliers(plan), RoundToNearest(plan))).run(graph, collect)
    rest = X.clone()
    rest[:, :, LARGE] = 0
    for name, got in zip("ab", graph(X), strict=True):
        remaining = weights[name].clone()
        if place == PLACES[0]:
            remaining[:, LARGE] = 0
        rounded = plan[name].scheme.weight.round_to_nearest(remaining).dequantize()
        want = rest @ rounded.t() + X[:, :, LARGE] @ weights[name][:, LARGE].t() + (bias if name == "a" else 0)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)
    (note,) = results["SeparateOutliers"].changed
    assert note.what == "3 of 16 features in float"
    assert note.data == {"outliers": 3, "features": 16, "absmax": 40.0, "linears": ["a", "b"]}


def test_before_rounding_the_function_stays_and_the_weight_loses_the_columns():
    graph, plan = two("w8a8_dyn")
    want = graph(X)
    Pipeline([SeparateOutliers(plan)]).run(graph, collect)
    for ours, theirs in zip(graph(X), want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    for linear in linears(graph.graph):
        gone = get_tensor(graph, linear.weight) == 0
        assert gone.all(0).nonzero().squeeze(1).tolist() == LARGE


@pytest.mark.parametrize("place", PLACES)
def test_one_mask_and_one_selection_serve_all_linears_of_a_value(place):
    graph, plan = two("w8a8_static")
    passes = placed(place, SeparateOutliers(plan), RoundToNearest(plan), QuantizeActivations(plan))
    Pipeline(passes).run(graph, collect)
    (selected,), (quantized,) = calls(graph, aten.index_select.default), calls(graph, ops.quantize_linear.default)
    assert graph.get_buffer("a.outlier_index").tolist() == LARGE
    assert graph.get_buffer("a.outlier_index").dtype == torch.int64
    assert graph.get_buffer("a.outlier_mask").nonzero().squeeze(1).tolist() == [i for i in range(16) if i not in LARGE]
    masked = quantized.args[0]
    assert is_call(masked, aten.mul.Tensor) and masked.args[1].target == "a.outlier_mask"
    assert masked.args[0] is selected.args[0]
    assert len(selected.users) == 2
    assert {node.meta["spec"].shape[-1] for node in selected.users} == {8, 12}


@pytest.mark.parametrize("place", PLACES)
def test_the_scale_of_what_is_left_does_not_know_the_outliers(place):
    graph, plan = two("w8a8_static")
    passes = placed(place, SeparateOutliers(plan), RoundToNearest(plan), QuantizeActivations(plan))
    (note,) = Pipeline(passes).run(graph, collect)["QuantizeActivations"].changed
    assert note.data["absmax"] <= 1
    assert float(graph.get_buffer("a.input_scale")) == pytest.approx(note.data["absmax"] / 127)


@pytest.mark.parametrize("place", PLACES)
def test_later_outliers_elsewhere_are_quantized_like_any_other_feature(place):
    """Columns are fixed: this is where the pass differs from LLM.int8()."""
    graph, plan = two("w8a8_static")
    Pipeline(placed(place, SeparateOutliers(plan), RoundToNearest(plan), QuantizeActivations(plan))).run(graph, collect)
    late, clipped = X.clone(), X.clone()
    late[:, :, 4], clipped[:, :, 4] = 500.0, 1.0
    for ours, theirs in zip(graph(late), graph(clipped), strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("place", PLACES)
def test_a_value_without_outliers_is_left_alone(place):
    graph, plan = two("w8a8_dyn")
    results = Pipeline(placed(place, SeparateOutliers(plan, 40.0), RoundToNearest(plan))).run(graph, collect)
    (note,) = results["SeparateOutliers"].skipped
    assert not results["SeparateOutliers"].changed
    assert note.what == "no feature above 40" and note.data["absmax"] == 40.0
    assert not calls(graph, aten.index_select.default)


@pytest.mark.parametrize("place", PLACES)
def test_all_features_may_be_outliers(place):
    graph, plan = two("w4a8")
    want = graph(X)
    passes = placed(place, SeparateOutliers(plan, 1e-6), RoundToNearest(plan), QuantizeActivations(plan))
    results = Pipeline(passes).run(graph, collect)
    assert results["SeparateOutliers"].changed[0].what == "16 of 16 features in float"
    for ours, theirs in zip(graph(X), want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.by_default("False-False", "True-True")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_correction_of_the_rounded_weight_leaves_the_float_columns_alone(shared, int8):
    graph, plan = two("w4a8")
    want = graph(X)
    Pipeline([RoundToNearest(plan), LoRC(plan, 16, int8, shared), SeparateOutliers(plan)]).run(graph, collect)
    for ours, theirs in zip(graph(X), want, strict=True):
        assert (ours - theirs).norm() < (3e-3 if int8 else 1e-5) * theirs.norm()


def test_a_correction_reads_what_the_rounded_weight_reads():
    graph, plan = two("w4a8")
    want = graph(X)
    Pipeline([SeparateOutliers(plan), RoundToNearest(plan), LoRC(plan, 16)]).run(graph, collect)
    for ours, theirs in zip(graph(X), want, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("place", PLACES)
def test_linears_with_float_inputs_keep_reading_the_value(captured, place):
    model = load_weights(captured("llama"))
    graphs = [(block.name, block.module.graph) for block in model.blocks]

    def scheme_for(name):
        return Scheme.parse("w4a16_g32" if "k_proj" in name else "w8a8_dyn") if "o_proj" not in name else None

    plan = {item.name: item for item in make_plan(graphs, scheme_for)}
    values = {linear.name: linear.input.name for block in model.blocks for linear in linears(block.module.graph)}
    run(model, placed(place, SeparateOutliers(plan, 1.0), RoundToNearest(plan)))
    block = model.blocks[1].module
    read = {node.meta["linear"]: node.args[0].name for node in block.graph.nodes if "linear" in node.meta}
    read |= {linear.name: linear.input.name for linear in linears(block.graph)}
    for name, value in read.items():
        assert (value == values[name]) == ("k_proj" in name or "o_proj" in name)


def test_what_was_decided_for_the_value_holds_for_what_is_left_of_it():
    graph, plan = two("w8a8_dyn")
    (value,) = {linear.input for linear in linears(graph.graph)}
    static, row = ActivationFormat("static"), RowScale(torch.ones(16), 0.5)
    handover = PassState(formats={value: static}, row_scales={value: row})
    step = SeparateOutliers(plan)
    step.call(graph, Context(collect(graph, step.statistics(graph)), handover=handover))
    (left,) = {linear.input for linear in linears(graph.graph)}
    assert left is not value
    assert handover.formats[left] is static and handover.row_scales[left] is row


@pytest.mark.by_default("w8a8_static-before*", "w8a8_dyn-*")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w8a8_static"])
def test_a_model_with_outliers_comes_closer_to_float(captured, scheme, place):
    want, got = logits(load_weights(captured("llama"))), {}
    for separate in (False, True):
        model = load_weights(captured("llama"))
        plan = plan_of(model, scheme)
        passes = [RoundToNearest(plan), QuantizeActivations(plan)]
        if separate:
            passes = placed(place, SeparateOutliers(plan, 6.0), *passes)
        results = run(model, passes)
        got[separate] = sqnr_db(want, logits(model))
    notes = [note for block in results.values() for note in block["SeparateOutliers"].changed]
    assert notes and all(0 < note.data["outliers"] < note.data["features"] / 2 for note in notes)
    assert got[True] > got[False] + 2


def test_gptq_makes_up_for_no_rounding_that_does_not_happen(captured):
    """After it, the float columns meet others that were changed for the sake of their rounding."""
    want, got = logits(load_weights(captured("llama"))), {}
    for place in PLACES:
        model = load_weights(captured("llama"))
        plan = plan_of(model, "w4a8")
        run(model, placed(place, SeparateOutliers(plan, 5.0), GPTQ(plan), QuantizeActivations(plan)))
        got[place] = sqnr_db(want, logits(model))
    assert got[PLACES[0]] > got[PLACES[1]]
