"""GPTQ against the elimination it stands for, in float64, and the Hessian it feeds on."""

import math
import weakref
from unittest.mock import patch

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError, RecipeError
from qexport.quant.affine import search_clip, weight_scales
from qexport.quant.formats import PER_CHANNEL, PER_TENSOR, IntegerFormat, Scheme
from qexport.quant.gptq import gptq_quantize, gptq_together
from qexport.quant.hessian import HessianStatistic, factorize

INT4 = IntegerFormat(4, 16)


def correlated(n=8, k=48, seed=0):
    """A weight [n, k] and the Hessian of features that share a few directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k)[:, None]
    x = torch.randn(400, k, generator=generator) @ mix * torch.rand(k, generator=generator)
    return torch.randn(n, k, generator=generator), (2 / 400) * x.t() @ x


def objective(w, q, hessian):
    error = (w - q.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def slow_gptq(w, hessian, fmt, scale, zero, act_order, damp=0.01):
    """Optimal brain quantization: eliminate one feature at a time from the inverse, no factorization, no blocks."""
    w, h, (n, k) = w.double().numpy().copy(), hessian.double().numpy(), w.shape
    order = sorted(range(k), key=lambda j: -h[j, j]) if act_order else list(range(k))
    inverse = numpy.linalg.inv(h + damp * numpy.mean(numpy.diag(h)) * numpy.eye(k))
    codes = numpy.zeros((n, k), dtype=numpy.int64)
    size = fmt.group_size if fmt.group_size > 0 else k
    for j in order:
        for i in range(n):
            at = (0, 0) if fmt.group_size == PER_TENSOR else (i, j // size)
            step, offset = float(scale[at]), int(zero[at]) if zero is not None else 0
            codes[i, j] = min(max(round(w[i, j] / step) + offset, fmt.qmin), fmt.qmax)
            w[i] -= (w[i, j] - (codes[i, j] - offset) * step) / inverse[j, j] * inverse[j]
        inverse -= numpy.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[:, j] = inverse[j] = 0
        inverse[j, j] = 1  # done with: no later step reaches it
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("size", [16, PER_CHANNEL, PER_TENSOR])
@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True)])
def test_codes_are_those_of_elimination(bits, symmetric, size, act_order):
    fmt = IntegerFormat(bits, size, symmetric)
    w, hessian = correlated()
    scale, zero_point = weight_scales(w, fmt)
    expected = slow_gptq(w, hessian, fmt, scale, zero_point, act_order)
    for block_size in (7, 128):
        q = gptq_quantize(w, hessian, fmt, act_order=act_order, block_size=block_size)
        assert torch.equal(q.scale, scale) and q.codes.is_contiguous()
        assert numpy.array_equal(q.codes.numpy(), expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_linears_that_read_one_input_share_a_factor(act_order):
    w, hessian = correlated()
    factor = factorize(hessian, 0.02, act_order)
    for weight in (w, w.flip(0) * 3):
        alone = gptq_quantize(weight, hessian, INT4, damp=0.02, act_order=act_order, clip_search=True)
        shared = gptq_quantize(weight, factor, INT4, clip_search=True)
        assert torch.equal(alone.codes, shared.codes) and torch.equal(alone.scale, shared.scale)


def test_weights_of_one_factor_get_together_what_each_gets_alone():
    """Whatever their formats: integers of other ranges, zero points and groups, tables, and tables of their own."""
    names = ("w4a16_g32_s8", "w4a16_g32_asym", "w8a16_pc", "nf4_g16", "nf4_g16", "nvfp4", "w2a16_g16_mid", "w4a16_pt")
    formats = [Scheme.parse(name).weight for name in names]
    _, hessian = correlated(k=96)
    weights = [correlated(8 + i, 96, seed=i)[0] for i in range(len(names))]
    factor = factorize(hessian, 0.01, True)
    together = gptq_together(weights, factor, formats, clip_search=True)
    for w, fmt, found in zip(weights, formats, together, strict=True):
        alone = gptq_quantize(w, factor, fmt, clip_search=True)
        assert torch.equal(alone.codes, found.codes) and alone.codes.dtype == found.codes.dtype
        assert torch.equal(alone.scale, found.scale) and alone.format == found.format


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = correlated(k=300)[1]
    for act_order in (True, False):
        factor = factorize(hessian, 0.01, act_order)
        upper = factor.reversed.double().flip(0, 1)
        assert torch.equal(upper, upper.triu())
        damped = (hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(300))[factor.order][
            :, factor.order
        ]
        assert float((upper.t() @ upper @ damped - torch.eye(300)).abs().max()) < 1e-2
        assert torch.equal(factor.order.sort().values, torch.arange(300))


def test_uncorrelated_features_are_rounded_to_nearest():
    w = correlated()[0]
    for fmt in (INT4, IntegerFormat(8, PER_CHANNEL), IntegerFormat(4, 16, False)):
        q = gptq_quantize(w, torch.diag(torch.linspace(1, 5, 48)), fmt)
        assert torch.equal(q.codes, fmt.round_to_nearest(w).codes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([16, PER_CHANNEL]))
def test_the_output_error_is_smaller_than_that_of_rounding(seed, symmetric, act_order, size):
    fmt = IntegerFormat(4, size, symmetric)
    w, hessian = correlated(32, 64, seed)
    q = gptq_quantize(w, hessian, fmt, act_order=act_order)
    assert objective(w, q, hessian) < objective(w, fmt.round_to_nearest(w), hessian)


def test_clip_search_takes_its_scales_from_the_hessian_diagonal():
    w, hessian = correlated()
    q = gptq_quantize(w, hessian, INT4, clip_search=True)
    assert torch.equal(q.scale, search_clip(w, INT4, hessian.diagonal())[0])
    assert not torch.equal(q.scale, weight_scales(w, INT4)[0])
    assert objective(w, q, hessian) < objective(w, INT4.round_to_nearest(w), hessian)


def without(hessian, dead):
    """The Hessian of inputs in which some features were never active."""
    hessian = hessian.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    return hessian


@pytest.mark.parametrize("fmt", [INT4, IntegerFormat(4, 16, False), IntegerFormat(8, PER_CHANNEL)])
def test_features_that_were_never_active_are_rounded_to_nearest_and_the_others_are_those_of_elimination(fmt):
    w, hessian = correlated()
    dead = torch.arange(48) % 3 == 1
    q = gptq_quantize(w, without(hessian, dead), fmt)
    scale, zero_point = weight_scales(w, fmt)
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.codes[:, dead], fmt.round_to_nearest(w).codes[:, dead])
    # In float64, of the others alone: what no feature met has no part in any error that they push around.
    seen, kept = hessian[~dead][:, ~dead], w[:, ~dead]
    groups = torch.arange(48)[~dead] // (fmt.group_size if fmt.group_size > 0 else 48)
    one_each = IntegerFormat(fmt.bits, 1, fmt.symmetric)
    zero = None if zero_point is None else zero_point[:, groups]
    expected = slow_gptq(kept, seen, one_each, scale[:, groups], zero, act_order=True)
    assert numpy.array_equal(q.codes[:, ~dead].numpy(), expected)


def test_a_searched_clip_does_not_forget_features_that_were_never_active():
    w, hessian = correlated()
    dead = torch.arange(48) >= 32  # the last group of 16
    q = gptq_quantize(w, without(hessian, dead), INT4, clip_search=True)
    assert torch.equal(q.scale[:, 2], search_clip(w, INT4)[0][:, 2])
    dead = torch.arange(48) % 16 == 5
    w[:, dead] = 4 * w.abs().max()
    clipped = search_clip(w, INT4, without(hessian, dead).diagonal())[0]
    assert (gptq_quantize(w, without(hessian, dead), INT4, clip_search=True).scale >= clipped).all()


def test_a_hessian_knows_the_features_it_never_saw():
    statistic = HessianStatistic("token_norm")
    with pytest.raises(NumericsError, match="no calibration token"):
        statistic.unseen()
    statistic.update(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1e-3]]))
    assert statistic.unseen().tolist() == [True, False, False]


def test_the_size_of_the_hessian_does_not_matter_and_inputs_are_left_alone():
    w, hessian = correlated()
    hessian[5] = hessian[:, 5] = 0
    before = w.clone(), hessian.clone()
    small, large = (gptq_quantize(w, hessian * 2.0**power, INT4) for power in (-30, 30))
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])


def test_damping_rises_until_the_hessian_can_be_factorized():
    w, hessian = correlated()
    mean = float(hessian.diagonal().mean())
    values, vectors = torch.linalg.eigh(hessian)
    for depth, works in ((0.005, True), (0.5, True), (5, True), (50, False)):
        # The smallest damping that helps lifts the lowest eigenvalue, -depth * mean, above zero.
        values[0] = -depth * mean
        indefinite = vectors @ torch.diag(values) @ vectors.t()
        if works:
            assert gptq_quantize(w, indefinite, INT4).dequantize().isfinite().all()
        else:
            with pytest.raises(NumericsError, match="factorized") as caught:
                gptq_quantize(w, indefinite, INT4)
            assert "calibration" in caught.value.remedy


def test_a_rank_one_hessian_works():
    w, x = correlated()[0], torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    q = gptq_quantize(w, 2 * x.t() @ x, INT4)
    assert objective(w, q, x.t() @ x) < 0.1 * objective(w, INT4.round_to_nearest(w), x.t() @ x)


def test_what_cannot_be_used_is_refused():
    w, hessian = correlated()
    with pytest.raises(NumericsError, match="Hessian is zero"):
        gptq_quantize(w, torch.zeros_like(hessian), INT4)
    for at in ((2, 2), (2, 9)):
        broken = hessian.clone()
        broken[at] = math.nan
        with pytest.raises(NumericsError, match="Hessian has NaN"):
            gptq_quantize(w, broken, INT4)
    w[0, 0] = math.inf
    with pytest.raises(NumericsError, match="weight has NaN"):
        gptq_quantize(w, hessian, INT4)


def slow_hessian(x, weights, exponent):
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row, weight in zip(x.double(), weights.tolist(), strict=True):
        norm = math.sqrt(sum(float(v) ** 2 for v in row))
        if norm:
            total += weight * torch.outer(row, row) / norm ** (2 * exponent)
    return 2 / len(x) * total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weighting, exponent", [("none", 0), ("token_norm", 1), ("token_norm", 0.5)])
def test_hessian_statistic_agrees_with_a_loop(weighting, exponent, weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 12, generator=generator) * torch.rand(30, 1, generator=generator) * 20
    x[4] = 0
    weights = torch.rand(30, generator=generator) if weighted else torch.ones(30)
    options = {"weighting": weighting} | ({"exponent": exponent} if exponent else {})
    statistic = HessianStatistic(**options)
    for piece, weight in zip(x.split([1, 9, 20]), weights.split([1, 9, 20]), strict=True):
        statistic.update(piece, weight if weighted else None)
    expected = slow_hessian(x, weights, exponent)
    # Float32 sums of 30 terms: the error is relative to the largest entry.
    assert float((statistic.value() - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert statistic.tokens == 30 and statistic.value().dtype == torch.float32


def test_the_half_of_the_hessian_that_is_not_summed_up_is_mirrored():
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    statistic = HessianStatistic()
    statistic.update(x[:30])
    assert torch.equal(statistic.value(), statistic.value().t())
    statistic.update(x[30:])
    expected = (2 / 40) * x.double().t() @ x.double()
    assert float((statistic.value() - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.equal(statistic.value(), statistic.total() * (2 / 40))


def test_an_attention_sink_does_not_own_the_normalised_hessian():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    sink = x.clone()
    sink[0] *= 1024
    values = []
    for data in (x, sink):
        statistic = HessianStatistic("token_norm")
        statistic.update(data)
        values.append(statistic.value())
    assert torch.allclose(*values, rtol=1e-5, atol=1e-7)
    assert float(values[0].trace()) == pytest.approx(2, rel=1e-5)


def test_hessian_statistic_refuses_what_it_cannot_use():
    with pytest.raises(NumericsError, match="no calibration token"):
        HessianStatistic().value()
    with pytest.raises(RecipeError, match="weighting"):
        HessianStatistic("norm")
    for weighting in ("none", "token_norm"):
        for bad in (math.nan, math.inf):
            x = torch.ones(3, 4)
            x[1, 2] = bad
            with pytest.raises(NumericsError, match="NaN or Inf"):
                HessianStatistic(weighting).update(x)


def test_a_hessian_that_nobody_else_holds_is_gone_when_it_is_factorized():
    statistic = HessianStatistic()
    statistic.update(torch.randn(64, 32))
    alive = weakref.ref(statistic.total())
    seen = []
    with patch("qexport.quant.hessian.invert_lower_", lambda matrix: seen.append(alive() is not None)):
        factorize(statistic.take(), 0.01, False)
    assert seen == [False]
    with pytest.raises(NumericsError):
        statistic.total()
