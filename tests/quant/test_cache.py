"""Codes of keys and values, and how two of 4 bits share a byte."""

import pytest
import torch

from qexport.quant.kv_cache import cache_codes, cache_scale, pack_cache, unpack_cache


@pytest.mark.parametrize("bits, low, high", [(8, -128, 127), (4, -8, 7)])
def test_codes_are_the_nearest_and_saturate(bits, low, high):
    scale = torch.tensor([0.5])
    x = torch.tensor([0.25, 0.75, -0.25, 0.3, 1e6, -1e6, 0.5 * high, 0.5 * low])
    assert cache_codes(x, scale, bits).tolist() == [0, 2, 0, 1, high, low, high, low]  # halves to even


def test_the_scale_reaches_the_largest_magnitude_and_is_never_zero():
    absmax = torch.tensor([2.0, 0.0])
    for bits, high in ((8, 127), (4, 7)):
        scale = cache_scale(absmax, bits)
        assert torch.allclose(scale, torch.tensor([2.0 / high] * 2)), "never seen: the widest of the others"
        assert (cache_scale(torch.zeros(2), bits) == 1).all()


def test_four_bits_share_a_byte_the_first_one_low():
    codes = torch.randint(-8, 8, (2, 3, 5, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_cache(codes, 4)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 5, 8)
    first, second = codes[0, 0, 0, :2].tolist()
    assert packed[0, 0, 0, 0].item() == (first + 8) + 16 * (second + 8)
    assert unpack_cache(packed, 4).equal(codes) and pack_cache(codes, 8) is codes
