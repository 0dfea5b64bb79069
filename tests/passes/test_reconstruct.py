"""Weights trained to be rounded: linears and blocks come closer to the float model; what cannot be trained says why."""

import json
import re
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from helpers import exports
from helpers.breadth import quick
from helpers.pass_runs import block_of, plan_of, run_passes, stream_of
from helpers.runners import load_weights, padded, tokens
from qexport.calibrate.block_activations import batches, collect, sqnr
from qexport.errors import NumericsError
from qexport.graph.edit import get_tensor, set_tensor
from qexport.graph.sites import by_input, linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Batch, Context, GraphPass, PassResult, PassState, Pipeline
from qexport.passes.equalization.crossquant import CrossQuant
from qexport.passes.weights.rtn import RoundToNearest
from qexport.passes.weights.zq_global import ZQGlobal
from qexport.passes.weights.zq_local import ZQLocal
from qexport.plan.linear_plan import LinearPlan, make_plan
from qexport.quant.formats import Scheme
from qexport.quant.hessian import HessianStatistic
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

IDS, MASK = tokens(8, 24), padded([24, 9, 24, 17, 24, 24, 5, 24], "left")


def calibrated(captured, ids=IDS, mask=MASK):
    return stream_of(captured, ids, mask, batch_size=2), stream_of(captured, ids, mask, batch_size=2)


def weights(module):
    return {linear.name: get_tensor(module, linear.weight) for linear in linears(module.graph)}


def errors(module, hessians, originals, plan):
    """For every linear the squared output error of its rounded weight against the original."""
    found = {}
    for linear in linears(module.graph):
        q = plan[linear.name].scheme.weight.round_to_nearest(get_tensor(module, linear.weight)).dequantize()
        off = (q - originals[linear.name]).double()
        found[linear.name] = float(((off @ hessians[linear.input].value().double()) * off).sum())
    return found


# ---- ZQ-Local --------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("w3a16_g16_asym", "w4a8")
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w3a16_g16_asym", "w4a8"])
def test_every_linear_has_less_error_than_rounding_and_says_how_much(captured, scheme):
    model = load_weights(captured("llama"))
    plan, (stream, _) = plan_of(model, scheme), calibrated(model)
    stream.advance(model.blocks[0], 0)
    block = model.blocks[1]
    originals = weights(block.module)
    wanted = dict.fromkeys(by_input(linears(block.module.graph)), lambda: HessianStatistic("token_norm", 0.75))
    hessians = collect(block, stream, block.module, wanted)
    before = errors(block.module, hessians, originals, plan)
    step = ZQLocal(plan, steps=40)
    with torch.no_grad():
        result = step.call(block.module, Context(collect(block, stream, block.module, step.statistics(block.module))))
    after = errors(block.module, hessians, originals, plan)
    assert {note.site for note in result.changed} == set(originals) and not result.skipped
    for note in result.changed:
        share = note.data["error relative to rounding"]
        assert share < 0.8 and share == pytest.approx(after[note.site] / before[note.site], rel=1e-2)
        assert re.fullmatch(r"error 0\.\d{3} of rounding's, learning rate 0\.\d+, \d+ steps", note.what)


@pytest.mark.by_default("gemma2")
@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt_neox"])  # biases and ReLU, soft caps, one linear for q, k, v
def test_whole_models_are_trained_and_rounded(captured, family):
    model = load_weights(captured(family))
    plan, (stream, reference) = plan_of(model, "w4a16_g32"), calibrated(model)
    passes = [ZQLocal(plan, steps=3), ZQGlobal(plan, steps=4), RoundToNearest(plan)]
    results = run_passes(model, passes, stream, reference)
    for block in model.blocks[1:-1]:
        local, together = results[block.name]["ZQLocal"], results[block.name]["ZQGlobal"]
        assert len(local.changed) + len(local.skipped) == len(results[block.name]["RoundToNearest"].changed) > 0
        assert len(together.changed) == 1


def layer(scheme="w4a16_g16"):
    """A block of a norm and a linear, the linear, a plan, and correlated inputs of it whose features differ in size."""
    block = block_of(nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 48)), width=32)
    (linear,) = linears(block.graph)
    plan = {linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse(scheme))}
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=random) * torch.logspace(0, -1.5, 32)[:, None]
    x = torch.randn(200, 32, generator=random) @ mix * torch.logspace(0, 1, 32)
    return block, linear, plan, x


def hessian_of(x):
    statistic = HessianStatistic()
    statistic.update(x)
    return statistic


def test_a_factor_that_rounding_does_not_see_is_not_seen_by_training():
    factor, found = torch.logspace(-1, 1, 32), []
    for folded in (None, factor):
        block, linear, plan, x = layer()
        w, given = get_tensor(block, linear.weight), x
        if folded is not None:  # in the columns, and its inverse in the input
            set_tensor(block, linear.weight, w * folded)
            given = x / folded
        handover = PassState(folded={} if folded is None else {linear.name: folded})
        step = ZQLocal(plan, steps=40, token_norm_power=0)
        assert step.statistics(block)[linear.input]().weighting == "none"
        result = step.call(block, Context({linear.input: hessian_of(given)}, handover=handover))
        trained = get_tensor(block, linear.weight)
        off = plan[linear.name].scheme.weight.round_to_nearest(trained if folded is None else trained / folded)
        found.append(float((x @ (off.dequantize() - w).T).square().sum()))
        assert len(result.changed) == 1
    off = plan[linear.name].scheme.weight.round_to_nearest(w).dequantize() - w
    rounded = float((x @ off.T).square().sum())
    assert found[0] < 0.5 * rounded and found[1] == pytest.approx(found[0], abs=0.05 * rounded)


@dataclass(frozen=True)
class Reads(GraphPass):
    """Remembers the float weights that passes before it have left."""

    seen: dict
    reads_float_weights = True

    def call(self, module, context):
        self.seen.update(context.handover.weights)
        return PassResult()


@pytest.mark.parametrize("method", [ZQLocal, ZQGlobal])
def test_the_original_weights_are_handed_on_and_not_written_to(captured, method):
    model = load_weights(captured("llama"))
    plan, (stream, reference) = plan_of(model, "w4a16_g32"), calibrated(model)
    originals = {name: w for block in model.blocks[1:3] for name, w in weights(block.module).items()}
    copies, seen = {name: w.clone() for name, w in originals.items()}, {}
    run_passes(model, [method(plan, steps=5), RoundToNearest(plan), Reads(seen)], stream, reference)
    for name, w in originals.items():
        assert seen[name] is w and torch.equal(w, copies[name])


@pytest.mark.parametrize("method", [ZQLocal, ZQGlobal])
def test_what_cannot_be_trained_says_why(captured, method):
    model = load_weights(captured("llama"))
    graphs = [(block.name, block.module.graph) for block in model.blocks]
    schemes = {"q_proj": Scheme.parse("nf4_g32"), "up_proj": None}
    plan = {
        made.name: made
        for made in make_plan(graphs, lambda name: schemes.get(name.rsplit(".")[-1], Scheme.parse("w4a16_g32")))
        if "o_proj" not in made.name
    }
    stream, reference = calibrated(model)
    originals = weights(model.blocks[1].module)
    results = run_passes(model, [method(plan, steps=5)], stream, reference)
    skipped = {n.site.rpartition(".")[2]: n.what for n in results[model.blocks[1].name][method.__name__].skipped}
    assert skipped == {
        "q_proj": "nf4_g32 is not an integer format", "up_proj": "kept in float by the recipe",
        "o_proj": "not in the plan",
    }  # fmt: skip
    for name, w in weights(model.blocks[1].module).items():
        assert (w is originals[name]) == (name.rpartition(".")[2] in skipped)


def test_a_linear_that_no_token_reached_is_left_alone():
    block, linear, plan, x = layer()
    result = ZQLocal(plan).call(block, Context({linear.input: hessian_of(x * 0)}))
    assert not result.changed and [n.what for n in result.skipped] == ["no calibration token reached it"]


def test_where_training_gains_nothing_the_weight_stays():
    block, linear, plan, x = layer()
    w = get_tensor(block, linear.weight)
    statistics = {linear.input: hessian_of(torch.eye(32))}
    result = ZQLocal(plan, (1e-6,), 2).call(block, Context(statistics))
    assert get_tensor(block, linear.weight) is w
    assert [n.what for n in result.skipped] == ["no learning rate gave less error than rounding"]

    target = block(x[None])[0]
    result = ZQGlobal(plan, (1e-9,), 2).call(block, Context(batches=[Batch((x[None],), target)]))
    assert get_tensor(block, linear.weight) is w
    assert [n.what for n in result.skipped] == ["training did not lower the error of the block"]


def test_bad_numbers_name_the_linear():
    block, linear, plan, x = layer()
    set_tensor(block, linear.weight, get_tensor(block, linear.weight) * torch.inf)
    with pytest.raises(NumericsError) as caught:
        ZQLocal(plan).call(block, Context({linear.input: hessian_of(x)}))
    assert caught.value.place == linear.name


# ---- ZQ-Global -------------------------------------------------------------------------------------------------------


def decibels(captured, scheme, extra, family="llama"):
    """SQNR of the first layer's and of the second layer's output on calibration data, and the passes' results."""
    model = load_weights(captured(family))
    plan, (stream, reference) = plan_of(model, scheme), calibrated(model)
    passes = [*extra(plan), RoundToNearest(plan), QuantizeActivations(plan)]
    found, results = [], {}
    for index, block in enumerate(model.blocks[:-1]):
        reference.advance(block, index)
        collected = partial(collect, block, stream)
        given = batches(model, block, stream, reference)
        results[block.name] = Pipeline(passes).run(block.module, collected, (), given)
        stream.advance(block, index)
        found.append(sqnr(model, block, stream, reference))
    return found[1:], results


@pytest.mark.by_default("w3a16_g16_asym")
@pytest.mark.parametrize(
    "scheme",
    quick(("w3a16_g16_asym", "w4a8"), among=["w4a16_g32", "w3a16_g16_asym", "w4a8", "w4a4", "w4a8_g32_int"]),
)
def test_the_output_of_every_block_comes_closer(captured, scheme):
    before, _ = decibels(captured, scheme, lambda plan: [])
    # Tokens as they are, because SQNR takes them so.
    after, results = decibels(captured, scheme, lambda plan: [ZQGlobal(plan, steps=40, token_norm_power=0)])
    assert all(trained > rounded + 2.5 for rounded, trained in zip(before, after, strict=True)), (before, after)
    (note,) = results["model.layers.0"]["ZQGlobal"].changed
    gained = after[0] - before[0]
    assert note.data["error relative to rounding"] == pytest.approx(10 ** (-gained / 10), rel=0.1)
    assert note.what.startswith("error of the block 0.") and note.site.count("_proj") == 7


@pytest.mark.slow
def test_dynamic_inputs_are_rounded_while_weights_are_trained(captured):
    """Four bits for inputs and eight for weights: the weights learn to make up for rounded inputs."""
    plans = {}

    def train(plan):
        plans.update(plan)
        return [ZQGlobal(plan, steps=40, token_norm_power=0)]

    without, _ = decibels(captured, "w8a4", lambda plan: [])
    seeing, _ = decibels(captured, "w8a4", train)
    assert seeing[0] > without[0] + 0.5


@pytest.mark.slow
def test_static_inputs_stay_in_float_while_weights_are_trained(captured):
    before, _ = decibels(captured, "w4a8_static", lambda plan: [])
    after, results = decibels(captured, "w4a8_static", lambda plan: [ZQGlobal(plan, steps=20, token_norm_power=0)])
    assert after[0] > before[0] + 1
    twin, others = decibels(captured, "w4a16_pc", lambda plan: [ZQGlobal(plan, steps=20, token_norm_power=0)])
    assert results["model.layers.0"]["ZQGlobal"].changed == others["model.layers.0"]["ZQGlobal"].changed


@pytest.mark.slow
def test_crossquants_row_scale_and_factor_are_trained_for(captured):
    def cross(plan):
        return CrossQuant(plan, alpha=0.15, paper_rows=True, round_before_fold=True)

    before, _ = decibels(captured, "w4a4_g32_int", lambda plan: [cross(plan)])
    after, results = decibels(
        captured, "w4a4_g32_int", lambda plan: [cross(plan), ZQGlobal(plan, steps=40, token_norm_power=0)]
    )
    (note,) = results["model.layers.0"]["ZQGlobal"].changed
    # What training saw is what is deployed, but for the weights' way to int8.
    assert note.data["error relative to rounding"] == pytest.approx(10 ** ((before[0] - after[0]) / 10), rel=0.1)
    assert after[0] > before[0] + 2


def test_padding_has_no_part_in_it(captured):
    trained = []
    for filler in (0, 77):
        model = load_weights(captured("llama"))
        ids = torch.where(MASK.bool(), IDS, filler)
        plan, (stream, reference) = plan_of(model, "w4a16_g32"), calibrated(model, ids)
        run_passes(model, [ZQGlobal(plan, steps=3)], stream, reference)
        trained.append(weights(model.blocks[1].module))
    for name, w in trained[0].items():
        assert torch.allclose(w, trained[1][name], atol=1e-5), name


def test_a_block_without_a_known_output_is_left_alone(captured):
    model = load_weights(captured("llama"))
    plan, (stream, reference) = plan_of(model, "w4a16_g32"), calibrated(model)
    results = run_passes(model, [ZQGlobal(plan, steps=3)], stream, reference)
    assert not results["epilogue"]["ZQGlobal"].changed
    (note,) = results["epilogue"]["ZQGlobal"].skipped
    assert (note.site, note.what) == ("lm_head", "what the float model hands on from this block is not known")
    alone = ZQGlobal(plan).call(model.blocks[1].module, Context())
    assert len(alone.skipped) == 7 and not alone.changed


@pytest.mark.by_default("ZQLocal")
@pytest.mark.parametrize("method", [ZQLocal, ZQGlobal])
def test_the_same_input_gives_the_same_weights(captured, method):
    found = []
    for _ in range(2):
        model = load_weights(captured("llama"))
        plan, (stream, reference) = plan_of(model, "w4a8_g32"), calibrated(model)
        run_passes(model, [method(plan, steps=6)], stream, reference)
        found.append([weights(block.module) for block in model.blocks[1:3]])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(w, other[name]) for name, w in one.items())


# ---- exports ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop(stage, what, done, total):
    if stage == "quantize" and what == "model.layers.1":
        raise Stop


@pytest.mark.by_default("zq_local")
@pytest.mark.parametrize("method", ["zq_local", "zq_global"])
def test_an_export_runs_and_resumes(captured, tmp_path, method):
    recipe = Recipe(
        scheme="w4a16_g32", weights=section("weights", method=method, steps=8),
        calibration=CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2),
    )  # fmt: skip
    whole = exports.export(captured("llama"), recipe, "cpu", tmp_path / "whole")
    name = {"zq_local": "ZQLocal", "zq_global": "ZQGlobal"}[method]
    report = json.loads((whole.folder / "report.json").read_text())["export"]
    assert len(report["blocks"][1]["changed"][name]) == (7 if method == "zq_local" else 1)
    with pytest.raises(Stop):
        exports.export(captured("llama"), recipe, "cpu", tmp_path / "parts", progress=stop)
    parts = exports.export(captured("llama"), recipe, "cpu", tmp_path / "parts", resume=True)
    for file in ("model.onnx", "model.onnx.data"):
        assert (whole.folder / file).read_bytes() == (parts.folder / file).read_bytes()
