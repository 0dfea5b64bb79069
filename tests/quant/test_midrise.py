"""Grids without a zero, and groups of different bits: the nearest of all values, scales, sizes."""

from itertools import product

import pytest
import torch

from qexport.errors import NumericsError, RecipeError
from qexport.quant.coarse_scales import coarse
from qexport.quant.formats import IntegerFormat, Scheme
from qexport.quant.formats.midrise import Midrise
from qexport.quant.formats.mixed_bits import MixedBits
from qexport.quant.gptq import gptq_quantize

W = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_each_weight_becomes_the_nearest_odd_number(bits, clip):
    fmt = Scheme.parse(f"w{bits}a16_g16_mid").weight
    found = fmt.round_to_nearest(W, clip)
    values, scale = range(-(2**bits) + 1, 2**bits, 2), found.scale.double()
    for n, k in product(range(6), range(96)):
        distance = {v: abs(float(W[n, k]) - v * float(scale[n, k // 16])) for v in values}
        assert distance[int(found.codes[n, k])] <= min(distance.values()) * (1 + 1e-6)
    assert torch.equal(found.dequantize(), found.codes.float() * found.scale.repeat_interleave(16, 1))
    if not clip:
        assert torch.allclose(found.scale * (2**bits - 1), W.view(6, 6, 16).abs().amax(-1))


def test_two_bits_without_a_zero_lose_less_than_two_with_one():
    """Of normal weights: symmetric codes have one level above zero and two below."""
    lost = {
        name: float((Scheme.parse(name).weight.round_to_nearest(W, True).dequantize() - W).square().mean())
        for name in ("w2a16_g16_mid", "w2a16_g16_mid_s8", "w2a16_g16_asym", "w2a16_g16")
    }
    # A zero point for each group of 16 is an eighth of a bit a weight, which buys 16 % of the error.
    assert lost["w2a16_g16_mid"] < 0.75 * lost["w2a16_g16"] and lost["w2a16_g16_mid"] < 1.16 * lost["w2a16_g16_asym"]
    assert lost["w2a16_g16_mid_s8"] < 1.05 * lost["w2a16_g16_mid"]


def test_names_sizes_and_what_is_refused():
    scheme = Scheme.parse("w2a16_g32_mid_s8")
    assert scheme.weight == Midrise(2, 32, coarse_scales=True) and scheme.table and scheme.interchangeable
    assert scheme.bytes((64, 128), 4) == 64 * 128 // 4 + 64 * (128 // 32 + 1)
    assert scheme.fit(1024 + 16)[0].name == "w2a16_g16_mid_s8"
    for name in ("w4a16_g32_mid", "w2a16_mid", "w2a16_g32_asym_mid"):
        with pytest.raises(RecipeError, match="unknown scheme"):
            Scheme.parse(name)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        scheme.weight.scales(torch.full((2, 32), torch.inf))


BITS = (1, 4, 2, 8, 3, 2)


@pytest.mark.parametrize("coarse_scales", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_groups_of_different_bits_are_those_of_formats_of_one(clip, coarse_scales):
    mixed = MixedBits.of(IntegerFormat(3, 16, coarse_scales=coarse_scales), BITS)
    found = mixed.round_to_nearest(W, clip)
    for group, bits in enumerate(BITS):
        own = (Midrise if bits <= 2 else IntegerFormat)(bits, 16)
        part = W[:, 16 * group : 16 * group + 16]
        alone = own.round_to_nearest(part, clip)
        if coarse_scales:
            assert torch.equal(found.scale[:, group], coarse(found.scale)[:, group])
        else:
            assert torch.equal(found.scale[:, group : group + 1], alone.scale)
            assert torch.equal(found.codes[:, 16 * group : 16 * group + 16], alone.codes)
    assert mixed.bytes((6, 96), 4) == 6 * (16 * sum(BITS) // 8 + (7 if coarse_scales else 24))
    assert mixed.stored_bits == 8


def test_gptq_on_an_identity_rounds_every_group_to_its_own_values():
    mixed = MixedBits.of(IntegerFormat(3, 16), BITS)
    found = gptq_quantize(W, torch.eye(96), mixed, clip_search=True)
    assert torch.equal(found.codes, mixed.encode(W, found.scale, None))


def test_what_cannot_have_bits_of_its_own_is_left():
    names = ["w3a16_g32", "w2a16_g16_mid_s8", "w3a16_g32_asym", "w3a16_g512", "w3a16_pc", "nf4_g32", "w3a8_g32_int"]
    takes = [MixedBits.may_replace(Scheme.parse(name).weight, 1024) for name in names]
    assert takes == [True, True, False, False, False, False, False]
    assert not MixedBits.may_replace(Scheme.parse("w3a16_g32").weight, 1000)
