"""AWQ keeps the float model, follows its formula, and lowers the output error of rounded weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.pass_runs import block_of, plan_of, run_passes, stream_of
from helpers.runners import load_weights, padded, run_twice, tokens
from qexport.calibrate.block_activations import Stream, collect
from qexport.errors import NumericsError, RecipeError
from qexport.graph.sites import fold_sites
from qexport.passes.base import Pipeline
from qexport.passes.equalization.awq import AWQ, awq_factors
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme

IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")
K = 64


@pytest.mark.each_value_once
@pytest.mark.parametrize("explicit, alpha", [(False, 0.7), (True, 0.7), (False, None)])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "opt", "gpt_neox", "gemma3"])
def test_logits_stay_what_they_were(captured, family, explicit, alpha):
    model = load_weights(captured(family))
    want = run_twice(model, IDS, MASK)
    results = run_passes(model, [AWQ(plan_of(model, "w4a16_g32"), explicit, alpha)], stream_of(model, IDS, MASK))
    got = run_twice(model, IDS, MASK)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for block in model.blocks[1:]:
        result, sites = results[block.name]["AWQ"], fold_sites(block.module.graph)
        no_place = 0 if explicit else sum(site.kind == "explicit" for site in sites)
        left = sum(note.what == "no factor is better than none" for note in result.skipped)
        assert len(result.skipped) == no_place + left
        assert len(result.changed) == len(sites) - len(result.skipped) > 0
        if alpha is None:
            assert all(note.data["error relative to no factor"] < 1 for note in result.changed)
        else:
            assert left == 0


def test_factors_of_grouped_heads_come_from_the_mean_over_the_queries_of_a_group(captured):
    model = load_weights(captured("llama"))
    block, name = model.blocks[1], "model.layers.0.self_attn.o_proj.weight"
    before = dict(block.module.named_buffers())[name].clone()
    plan, stream = plan_of(model, "w4a16_g32"), stream_of(model, IDS, MASK)
    stream.advance(model.blocks[0], 0)
    site = next(s for s in fold_sites(block.module.graph) if s.repeat is not None)
    rows = []

    class Rows:
        def update(self, x):
            rows.append(x)

    collect(block, stream, block.module, {site.value: Rows})
    mean = torch.cat(rows).abs().mean(0)
    run_passes(model, [AWQ(plan, alpha=1.0)], stream_of(model, IDS, MASK))
    ratio = (dict(block.module.named_buffers())[name] / before).median(0).values.view(2, 2, 16)
    assert torch.allclose(ratio[:, 0], ratio[:, 1], rtol=1e-5)
    shared = mean.view(2, 2, 16).mean(1)
    assert torch.allclose(ratio[:, 0], shared / (shared.max() * shared.min()).sqrt(), rtol=1e-4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(K), nn.Linear(K, 48)

    def forward(self, x):
        return self.linear(self.norm(x))


def rounded(gains, passes, scheme="w4a16_g32"):
    """The squared output error of a block with these gains of its norm after passes and rounding, and the results."""
    block, x = block_of(Layer(), K), torch.randn(8, 5, K, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dict(block.named_buffers())["norm.weight"].copy_(gains)
        dict(block.named_buffers())["norm.bias"].zero_()
        want = block(x)[0]
    plan = {"linear": LinearPlan("linear", "", (48, K), Scheme.parse(scheme))}

    class Whole:
        inputs = ["x"]
        module = block

    stream = Stream([{"x": x}], [None], {"x": 0})
    steps = [*(make(plan) for make in passes), RoundToNearest(plan)]
    results = Pipeline(steps).run(block, lambda module, asked: collect(Whole, stream, module, asked), (x,))
    with torch.no_grad():
        return float((block(x)[0] - want).square().sum()), results


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w3a16_pc", "nf4_g32"])
def test_a_salient_channel_is_protected(scheme):
    gains = torch.ones(K)
    gains[[5, 40]] = 25.0
    plain, _ = rounded(gains, [], scheme)
    found, results = rounded(gains, [AWQ], scheme)
    assert found < 0.5 * plain
    note = results["AWQ"].changed[0]
    assert note.data["alpha"] > 0 and note.data["error relative to no factor"] == pytest.approx(found / plain, rel=0.01)


def test_where_all_channels_are_alike_and_where_alpha_is_zero_nothing_is_folded():
    for make, what in (
        (lambda plan: AWQ(plan, alpha=0.0), "alpha 0 makes no factors"),
        (AWQ, "no factor is better than none"),
    ):
        gains = torch.zeros(K)
        gains[7] = 1.0  # one live channel: its factor is 1 whatever alpha is
        error, results = rounded(gains, [make])
        assert not results["AWQ"].changed
        (note,) = results["AWQ"].skipped
        assert note.what == what and note.data["alpha"] == 0
        assert error == rounded(gains, [])[0]


def test_linears_in_float_are_left_alone(captured):
    model = load_weights(captured("llama"))
    plan = {name: LinearPlan(name, p.block, p.shape, None) for name, p in plan_of(model, "w4a16_g32").items()}
    results = run_passes(model, [AWQ(plan)], stream_of(model, IDS, MASK))
    for block in model.blocks[1:]:
        result = results[block.name]["AWQ"]
        assert not result.changed and {note.what for note in result.skipped} == {"these linears stay in float"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 0.05, 0.5, 0.95, 1]))
def test_factors_agree_with_a_loop(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(12, generator=generator) * torch.logspace(-6, 3, 12)
    mean[4] = 0
    factors = awq_factors(mean, alpha)
    assert factors.dtype == torch.float32 and float(factors[4]) in factors[torch.arange(12) != 4].tolist()
    raw = [max(float(m) ** alpha, 1e-4) for m in mean if m > 0]
    middle = math.sqrt(max(raw) * min(raw))
    live = [float(f) for j, f in enumerate(factors) if j != 4]
    assert live == pytest.approx([r / middle for r in raw], rel=1e-6)


def test_impossible_factors():
    assert torch.equal(awq_factors(torch.zeros(3), 0.5), torch.ones(3))
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(RecipeError, match="alpha"):
            awq_factors(torch.ones(3), alpha)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        awq_factors(torch.tensor([1.0, math.inf]), 0.5)
