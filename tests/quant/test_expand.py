"""Weights in groups as int8 per channel: exact float32 arithmetic, and what the second rounding costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.quant.expand import expand_to_int8, expanded_scale
from qexport.quant.formats import IntegerFormat


def random(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def expanded(weight, factor=None):
    zero = None if weight.zero_point is None else weight.zero_point.t()
    row = expanded_scale(weight, factor)
    codes = expand_to_int8(weight.codes.t(), weight.scale.t(), zero, factor, row, weight.format.group_size)
    return codes, row


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_every_value_is_the_nearest_int8_multiple_of_its_row_scale(bits, symmetric):
    weight = IntegerFormat(bits, 32, symmetric).round_to_nearest(random(24, 96))
    factor = random(1, 96, 1)[0].abs() + 0.1
    codes, row = expanded(weight, factor)
    target = (weight.dequantize() * factor).double()
    assert codes.dtype == torch.int8 and codes.shape == (96, 24)
    error = (codes.t().double() * row.double()[:, None] - target).abs()
    assert bool((error <= row.double()[:, None] * (0.5 + 1e-5)).all())
    assert codes.abs().amax(0).eq(127).all()  # the range of every row is used


@given(st.integers(0, 10_000), st.sampled_from([16, 32]))
@settings(max_examples=30, deadline=None)
def test_the_second_rounding_is_small_beside_the_first(seed, group):
    w = random(16, 64, seed)
    weight = IntegerFormat(4, group).round_to_nearest(w)
    codes, row = expanded(weight)
    first = (weight.dequantize() - w).square().mean()
    second = (codes.t() * row[:, None] - weight.dequantize()).square().mean()
    assert second < 0.06 * first


def test_a_row_of_zeros_stays_zero():
    weight = IntegerFormat(4, 16).round_to_nearest(torch.zeros(2, 32))
    codes, row = expanded(weight)
    assert not codes.any() and torch.equal(row, torch.ones(2))
