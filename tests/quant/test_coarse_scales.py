"""Scales of 8 bits: the nearest number there is, and bytes that stand for exactly it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qexport.quant.coarse_scales import coarse, coarse_codes, coarse_values
from qexport.quant.formats import QuantizedWeight, Scheme

NUMBERS = st.floats(2.0**-100, 2.0**100, width=32)
ROWS = st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=4)


def slowly(row):
    """The nearest of all numbers that a row can have, by exact fractions; even significands win ties."""
    octave = {number: math.frexp(number)[1] - 1 for number in row}
    nearest = []
    for number in row:
        unit = Fraction(2) ** (octave[number] - 4)
        nearest.append(round(Fraction(number) / unit) * unit)
    top = max(nearest)
    floor = Fraction(2) ** (math.frexp(float(top))[1] - 1 - 15)
    return [float(max(number, floor)) for number in nearest]


@given(ROWS)
def test_they_are_the_nearest_there_are_and_their_bytes_are_exact(rows):
    scale = torch.tensor(rows)
    found = coarse(scale)
    assert found.tolist() == [slowly(row) for row in scale.tolist()]
    codes, exponents = coarse_codes(found)
    assert torch.equal(coarse_values(codes, exponents), found) and torch.equal(coarse(found), found)
    assert torch.equal(coarse(scale.t(), dim=0), found.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrower_dtype_changes_none_of_them(dtype):
    scale = coarse(torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-5)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert all(map(torch.equal, coarse_codes(scale.to(dtype)), coarse_codes(scale)))


def test_other_numbers_have_no_bytes():
    with pytest.raises(ValueError, match="no 8 bits"):
        coarse_codes(torch.tensor([[1.0, 1.03]]))
    with pytest.raises(ValueError, match="no 8 bits"):
        coarse_codes(torch.tensor([[1.0, 2.0**-16]]))


@pytest.mark.parametrize("scheme", ["w4a16_g32_s8", "w4a16_g16_asym_s8", "w2a16_g32_s8", "w3a16_g64_s8", "nf4_g16_s8"])
@pytest.mark.parametrize("clip_search", [False, True])
def test_codes_are_rounded_with_the_scales_that_are_kept(scheme, clip_search):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    w[:, :16] *= 300  # one group of a row far above the others
    w[3] = 0
    fmt, free = Scheme.parse(scheme).weight, Scheme.parse(scheme.removesuffix("_s8")).weight
    found = fmt.round_to_nearest(w, clip_search)
    assert torch.equal(found.scale, coarse(found.scale))
    assert torch.equal(found.codes, fmt.encode(w, found.scale, found.zero_point))
    lost, least = ((f.dequantize() - w).square().sum() for f in (found, free.round_to_nearest(w, clip_search)))
    assert lost < 1.06 * least


def test_scales_that_a_method_leaves_are_rounded_and_codes_stay():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    plain, fmt = Scheme.parse("w4a16_g32").weight.round_to_nearest(w), Scheme.parse("w4a16_g32_s8").weight
    kept = fmt.kept(QuantizedWeight(plain.codes, plain.scale, None, fmt))
    assert torch.equal(kept.scale, coarse(plain.scale)) and kept.codes is plain.codes
    assert plain.format.kept(plain) is plain
