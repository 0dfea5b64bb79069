"""Factors of SmoothQuant and of logarithmic equalization against their formulas, feature by feature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError, RecipeError
from qexport.quant.smoothing import crossquant_factors, filled, lae_factors, smoothquant_factors


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    activation = torch.rand(12, generator=generator) * torch.logspace(-2, 3, 12)
    return activation, [torch.randn(n, 12, generator=generator) for n in (3, 5)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 0.25, 0.5, 0.85, 1]))
def test_factors_agree_with_a_loop(seed, alpha):
    activation, weights = case(seed)
    factors = smoothquant_factors(activation, weights, alpha)
    assert factors.dtype == torch.float32 and factors.shape == (12,)
    for j in range(12):
        weight = max(abs(float(w[i, j])) for w in weights for i in range(len(w)))
        expected = max(float(activation[j]), 1e-5) ** alpha / max(weight, 1e-5) ** (1 - alpha)
        assert float(factors[j]) == pytest.approx(max(expected, 1e-5), rel=1e-6)


def test_half_way_makes_both_ranges_equal():
    activation, weights = case()
    factors = smoothquant_factors(activation, weights, 0.5)
    scaled = torch.cat(weights).abs().amax(0) * factors
    assert torch.allclose(scaled, activation / factors, rtol=1e-5)


def test_a_feature_that_was_never_active_is_taken_for_the_median_one():
    """A factor of 1 beside others of a hundredth would give its weights a hundred times their part in a row's scale."""
    activation, weights = case()
    activation *= 1e-3
    activation[2] = 0
    median = float(activation[activation > 0].median())
    assert float(filled(activation)[2]) == median and torch.equal(filled(torch.zeros(3)), torch.zeros(3))
    known = activation.clone()
    known[2] = median
    for found, expected in (
        (smoothquant_factors(activation, weights, 0.5), smoothquant_factors(known, weights, 0.5)),
        (lae_factors(activation), lae_factors(known)),
        (crossquant_factors(activation, 0.15), crossquant_factors(known, 0.15)),
    ):
        assert torch.equal(found, expected) and float(found[2]) < 0.5
    none = torch.zeros_like(activation)
    assert all((f == 1).all() for f in (smoothquant_factors(none, weights, 0.5), lae_factors(none)))
    assert (crossquant_factors(none, 0.5) == 1).all()


def test_features_without_a_reader_keep_one_and_small_ranges_are_floored():
    activation, weights = case()
    for w in weights:
        w[:, 5] = 0
        w[:, 7] = 1e-9
    activation[8] = 1e-9
    factors = smoothquant_factors(activation, weights, 0.5)
    assert float(factors[5]) == 1
    assert float(factors[7]) == pytest.approx(math.sqrt(float(activation[7]) / 1e-5), rel=1e-6)
    top = max(float(w[:, 8].abs().max()) for w in weights)
    assert float(factors[8]) == pytest.approx(math.sqrt(1e-5 / top), rel=1e-6)
    weights[0][:, 8] = 1e6
    assert float(smoothquant_factors(activation, weights, 0.5)[8]) == pytest.approx(1e-5)  # sqrt(1e-11) is below it


def test_what_cannot_be_used_is_refused():
    activation, weights = case()
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(RecipeError, match="alpha"):
            smoothquant_factors(activation, weights, alpha)
    weights[1][2, 3] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        smoothquant_factors(activation, weights, 0.5)
    activation, weights = case()
    activation[0] = math.inf
    with pytest.raises(NumericsError, match="NaN or Inf"):
        smoothquant_factors(activation, weights, 0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=9))
def test_logarithmic_factors_agree_with_a_loop(ranges):
    factors = lae_factors(torch.tensor(ranges))
    assert factors.dtype == torch.float32 and factors.shape == (len(ranges),)
    active = sorted(r for r in ranges if r)
    for got, r in zip(factors.tolist(), ranges, strict=True):
        r = r or (active[(len(active) - 1) // 2] if active else 0)
        assert got == pytest.approx(max(r / math.log2(2 + r), 1e-5) if r else 1, rel=1e-6)


def test_logarithmic_equalization_turns_a_range_into_its_logarithm():
    ranges = torch.logspace(-4, 4, 50)
    left = ranges.double() / lae_factors(ranges)
    assert torch.allclose(left, torch.log2(2 + ranges.double()), rtol=1e-6)
    assert left.max() / left.min() < 14 and ranges.max() / ranges.min() > 9e7
    assert (left.diff() > 0).all(), "the order of the channels stays"


def test_logarithmic_equalization_of_ranges_next_to_zero():
    factors = lae_factors(torch.tensor([1e-20, 1e-6, 1.0]))
    assert factors.tolist() == pytest.approx([1e-5, 1e-5, 1 / math.log2(3)], rel=1e-6)
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            lae_factors(torch.tensor([1.0, bad]))
