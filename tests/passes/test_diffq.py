"""DiffQ: noise has the width of a step and its gradient, bits go where noise hurts, and their sum is the scheme's."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.pass_runs import block_of, collecting
from qexport.graph.sites import linears
from qexport.passes.base import Batch, Context
from qexport.passes.weights.diffq import DiffQ, NoisyWeight, whole_bits
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme

FMT = Scheme.parse("w3a16_g16").weight


@settings(deadline=None, max_examples=50)
@example([8.0, 1.0], 5)
@given(st.lists(st.floats(1, 8), min_size=1, max_size=12), st.integers(1, 6))
def test_whole_bits_have_the_sum_of_the_scheme(bits, mean):
    given_bits = torch.tensor(bits)
    found = whole_bits(given_bits, mean)
    assert all(1 <= few <= 8 for few in found) and sum(found) <= mean * len(bits)
    if float(given_bits.mean()) == pytest.approx(mean, abs=1e-6):
        assert sum(found) == mean * len(bits) and all(abs(few - b) <= 1 for few, b in zip(found, bits, strict=True))


def test_noise_and_its_gradient_are_those_of_the_formula():
    random = torch.Generator().manual_seed(0)
    w, factor = torch.randn(5, 48, generator=random), torch.rand(48, generator=random) + 0.5
    latent = NoisyWeight(w, FMT, factor, torch.Generator().manual_seed(1))
    with torch.no_grad():
        latent.shift.copy_(torch.tensor([0.5, -0.25, 0.2]))
    values, weights = latent.rounded(), torch.randn(5, 48, generator=random)
    (gradient,) = torch.autograd.grad((values * weights).sum(), latent.shift)

    noise = 2 * torch.rand(5, 3, 16, generator=torch.Generator().manual_seed(1)).double() - 1
    shift = torch.tensor([0.5, -0.25, 0.2], dtype=torch.float64, requires_grad=True)
    bits, groups = 3 + shift - shift.mean(), w.double().view(5, 3, 16)
    by_hand = groups + noise * (groups.abs().amax(-1) / (2**bits - 1))[..., None]
    by_hand = by_hand.view(5, 48) * factor
    assert torch.allclose(values.double(), by_hand, atol=1e-6)
    (wanted,) = torch.autograd.grad((by_hand * weights).sum(), shift)
    assert torch.allclose(gradient.double(), wanted, atol=1e-5)


def test_groups_whose_inputs_are_large_get_more_bits():
    block = block_of(nn.Sequential(nn.Linear(64, 8)), width=64)
    (linear,) = linears(block.graph)
    plan = {linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse("w3a16_g16"))}
    sizes = torch.tensor([0.01, 3.0, 0.1, 0.3]).repeat_interleave(16)
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0)) * sizes
    given_batches = [Batch((part[None],), block(part[None])[0].detach()) for part in x]
    step = DiffQ(plan, act_order=False, steps=40, rate=0.2)
    statistics = collecting(x)(block, step.statistics(block))
    with torch.no_grad():
        result = step.call(block, Context(statistics=statistics, batches=given_batches))
    assert result.changed[-1].what.startswith("groups by their bits: ")
    codes = next(block.get_buffer(n.target) for n in block.graph.nodes if "codes" in str(n.target))
    spread = [len(codes[16 * group : 16 * group + 16].unique()) for group in range(4)]
    assert spread[1] > 8 and spread[1] > max(spread[0], *spread[2:])


def test_without_a_target_all_groups_keep_the_bits_of_the_scheme():
    block = block_of(nn.Sequential(nn.Linear(32, 8)), width=32)
    (linear,) = linears(block.graph)
    plan = {linear.name: LinearPlan(linear.name, "", linear.shape, Scheme.parse("w3a16_g16"))}
    x = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(0))
    step = DiffQ(plan)
    result = step.call(block, Context(statistics=collecting(x)(block, step.statistics(block))))
    assert [record.what for record in result.changed] == ["w3a16_g16"]
