"""Methods that train what makes the codes of a block: never worse than rounding, and what is trained is deployed."""

import json
import re

import pytest
import torch
from torch import nn

from helpers import exports
from helpers.pass_runs import block_of, plan_of, run_passes, stream_of
from helpers.runners import load_weights, padded, tokens
from qexport.calibrate.block_activations import batches, sqnr
from qexport.graph.edit import get_tensor
from qexport.graph.sites import linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Batch, Context, PassState
from qexport.passes.weights.autoround import AutoRound
from qexport.passes.weights.lrq import LRQ
from qexport.passes.weights.omniquant import OmniQuant
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.quant.learned_codes import codes_of, grid_of, range_of, values_through
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

IDS, MASK = tokens(8, 24), padded([24, 9, 24, 17, 24, 24, 5, 24], "left")
SLOW = pytest.mark.slow
METHODS = {
    "autoround": lambda plan, steps=30, clip_rate=None, clip_search=False: AutoRound(
        plan, steps, 1, 0.0, 1 / steps, 1 / steps if clip_rate is None else clip_rate, clip_search
    ),
    "omniquant": lambda plan, steps=30, equalize=True: OmniQuant(plan, steps, 1, 0.0, 0.1, equalize, 0.02),
    "lrq": lambda plan, steps=30: LRQ(plan, steps, 1, 0.0, 8, 0.02),
}

# What they share is tested once by default.
ONE = ["autoround", *(pytest.param(name, marks=SLOW) for name in ("omniquant", "lrq"))]


def layer(scheme="w3a16_g16"):
    """A block of a norm and a linear, the linear, a plan, and inputs whose features are correlated."""
    block = block_of(nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 48)), width=32)
    (linear,) = linears(block.graph)
    plan = {linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse(scheme))}
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=random) * torch.logspace(0, -1.5, 32)[:, None]
    return block, linear, plan, torch.randn(4, 50, 32, generator=random) @ mix


def trained(method, scheme="w3a16_g16", folded=None, **options):
    """Error in float64 of the trained block and of the rounded one, its result, and the codes of both."""
    found = {}
    for name in ("rtn", method):
        block, linear, plan, x = layer(scheme)
        target = block(x)[0].detach()
        given = [Batch((part[None],), want[None]) for part, want in zip(x, target, strict=True)]
        step = RoundToNearest(plan) if name == "rtn" else METHODS[name](plan, **options)
        handover = PassState(folded={} if folded is None else {linear.name: folded})
        with torch.no_grad():
            result = step.call(block, Context(batches=given, handover=handover))
            error = float((block(x)[0].double() - target.double()).square().sum())
        codes = [get_tensor(block, n.target) for n in block.graph.nodes if n.op == "get_attr"]
        found[name] = (error, result, [c for c in codes if not c.is_floating_point()][0].int())
    return found[method], found["rtn"]


@pytest.mark.by_default("w2a16_g16_asym-omniquant", "w4a8_g16_int-lrq")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "scheme",
    ["w2a16_g16_asym", "w4a8_g16_int", *(pytest.param(n, marks=SLOW) for n in ("w3a16_g16", "w4a16_g16", "w4a8"))],
)
def test_a_trained_linear_is_never_worse_than_a_rounded_one(method, scheme):
    (error, result, _), (rounded, _, _) = trained(method, scheme)
    share = result.changed[0].data["error relative to rounding"]
    assert error < 0.95 * rounded and share < 0.95
    assert re.fullmatch(r"error of the block 0\.\d{3} of rounding's, step \d+ of 30", result.changed[0].what)
    if scheme.endswith("g16"):  # what was trained is what is deployed
        assert share == pytest.approx(error / rounded, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_training_that_brings_nothing_leaves_the_nearest_codes(method):
    (error, result, codes), (rounded, _, nearest) = trained(method, "w8a16_g16", steps=1)
    if result.changed[0].what.endswith("step 0 of 1"):
        assert torch.equal(codes, nearest) and error == rounded
    assert error <= rounded


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_of_the_columns_is_not_seen_by_rounding(method):
    factor = torch.logspace(-0.3, 0.3, 32)
    (error, result, _), (rounded, _, _) = trained(method, "w4a8_g16_int", folded=factor)
    assert error < rounded and result.changed[0].data["error relative to rounding"] < 1


@pytest.mark.parametrize("method", ONE)
def test_a_whole_model_is_trained_the_same_way_twice(captured, method):
    found = []
    for _ in range(2):
        model = load_weights(captured("llama"))
        plan, streams = plan_of(model, "w4a8_g32"), [stream_of(model, IDS, MASK) for _ in range(2)]
        results = run_passes(model, [METHODS[method](plan, steps=4)], *streams)
        name = type(METHODS[method](plan)).__name__
        found.append([
            get_tensor(block.module, n.target)
            for block in model.blocks for n in block.module.graph.nodes if n.op == "get_attr"
        ])  # fmt: skip
        for block in model.blocks[1:-1]:
            assert results[block.name][name].changed[0].site.count("_proj") == 7
        (note,) = results["epilogue"][name].skipped
        assert note.what == "what the float model hands on from this block is not known"
        assert [n.site for n in results["epilogue"][name].changed] == ["lm_head"]  # rounded to nearest
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_offsets_alone_move_codes_by_one_at_most():
    (_, _, codes), (_, _, nearest) = trained("autoround", "w4a16_g16", clip_rate=0.0)
    moved = codes - nearest
    assert int(moved.count_nonzero()) > 0 and int(moved.abs().max()) == 1


def test_symmetric_2_bits_begin_with_ranges_that_are_searched():
    """From whole ranges, most weights are nothing: training cannot make up for that in as many steps as it has."""
    found = {clip: trained("autoround", "w2a16_g16", clip_search=clip)[0][0] for clip in (False, True)}
    assert found[True] < 0.8 * found[False]


@pytest.mark.parametrize("name", ["w4a16_g16", "w4a16_g16_asym", "w3a16_g16_s8", "w4a16_g128", "w4a8", "w8a16_pc"])
def test_learned_codes_begin_as_the_nearest_ones(name):
    fmt, w = Scheme.parse(name).weight, torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    scale, zero = grid_of(*range_of(w, fmt), fmt)
    size = fmt.group_size or 160
    steps = nn.functional.pad(w, (0, -160 % size)).view(6, -1, size) / scale[..., None]
    found, nearest = codes_of(steps, scale, zero, fmt, 160), fmt.round_to_nearest(w)
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)
    assert (zero is None) == (nearest.zero_point is None)
    assert zero is None or torch.equal(found.zero_point, nearest.zero_point)
    assert torch.equal(values_through(steps, scale, zero, fmt, 160), nearest.dequantize())


def test_gradients_are_those_of_the_grid():
    """In float64, by hand: through rounding as it is, to the scale by what is left of rounding, none where clamped."""
    fmt = Scheme.parse("w4a16_g16").weight
    w = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 16)
    scale = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)  # codes from -8 to 7: both ends clamp
    offset, weights = torch.zeros_like(w).requires_grad_(), torch.arange(1.0, 17, dtype=torch.float64)
    (values_through(w / scale[..., None] + offset, scale, None, fmt, 16) * weights).sum().backward()
    steps = (w / 0.1).flatten()
    inside = (steps.round() >= -8) & (steps.round() <= 7)
    assert torch.allclose(offset.grad.flatten(), 0.1 * weights * inside)
    by_hand = torch.where(inside, steps.round() - steps, steps.round().clamp(-8, 7))
    assert torch.allclose(scale.grad.flatten(), (by_hand * weights).sum())


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=SLOW)])
def test_trained_factors_are_folded_and_what_was_trained_is_deployed(captured, family):
    errors, norms = {}, {}
    for equalize in (None, False, True):
        model = load_weights(captured(family))
        plan, (stream, reference) = plan_of(model, "w4a8_g16_int"), [stream_of(model, IDS, MASK) for _ in range(2)]
        step = RoundToNearest(plan) if equalize is None else METHODS["omniquant"](plan, 12, equalize)
        block = model.blocks[1]
        for part in (stream, reference):
            part.advance(model.blocks[0], 0)
        before = {name: get_tensor(block.module, name).clone() for name in block.parameters if "norm" in name}
        reference.advance(block, 1)
        given = batches(model, block, stream, reference)
        with torch.no_grad():
            result = step.call(block.module, Context(batches=given))
            QuantizeActivations(plan).call(block.module, Context(batches=given))
        stream.advance(block, 1)
        errors[equalize] = 10 ** (-sqnr(model, block, stream, reference) / 10)
        norms[equalize] = [torch.equal(w, get_tensor(block.module, name)) for name, w in before.items()]
        if equalize is not None:
            share = result.changed[0].data["error relative to rounding"]
            assert share < 0.95 and share == pytest.approx(errors[equalize] / errors[None], rel=0.1)
    assert all(norms[False]) and not any(norms[True]) and len(norms[True]) >= 2


@pytest.mark.parametrize("method", ONE)
def test_an_export_runs_and_says_what_was_trained(captured, tmp_path, method):
    recipe = Recipe(
        scheme="w4a16_g32", weights=section("weights", method=method, steps=4),
        calibration=CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2),
    )  # fmt: skip
    done = exports.export(captured("llama"), recipe, "cpu", tmp_path / "out")
    report = json.loads((done.folder / "report.json").read_text())["export"]
    name = type(METHODS[method]({})).__name__
    assert len(report["blocks"][1]["changed"][name]) == 8
