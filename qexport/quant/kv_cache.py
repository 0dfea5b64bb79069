"""Keys and values of attention in 8 or 4 bits: symmetric codes, calibrated scales, as GroupQueryAttention has them.

Or E4M3 numbers in the place of integers.
"""

import torch
from torch import Tensor

from .small_floats import E4M3_LARGEST, e4m3_codes, e4m3_values


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def cache_scale(absmax: Tensor, bits: int, e4m3: bool = False) -> Tensor:
    """absmax / the largest code or number, float32 of absmax's shape.

    A channel where nothing but zeros was seen gets the widest scale of the others, as new data may wake it; 1 where all
    are such.
    """
    largest = E4M3_LARGEST if e4m3 else code_range(bits)[1]
    scale = absmax.float().masked_fill(absmax == 0, float(absmax.max())) / largest
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1)


def cache_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """round(x / scale), half to even, clamped; int8 of x's shape.

    Args:
        x: [batch, kv_heads, tokens, head_dim]; scale: float32 [kv_heads, 1, head_dim] or [1].
    """
    return torch.round(x.float() / scale).clamp_(*code_range(bits)).to(torch.int8)


def stored_cache(x: Tensor, scale: Tensor, bits: int, e4m3: bool = False) -> Tensor:
    """Keys or values as the cache holds them: `pack_cache` of their codes, or float8_e4m3fn.

    Args:
        x, scale: as `cache_codes`.
    """
    if e4m3:
        return e4m3_codes(x.float() / scale).view(torch.float8_e4m3fn)
    return pack_cache(cache_codes(x, scale, bits), bits)


def read_cache(cache: Tensor, scale: Tensor, bits: int, e4m3: bool = False) -> Tensor:
    """What `stored_cache` stands for, float32."""
    codes = e4m3_values(cache.view(torch.uint8)) if e4m3 else unpack_cache(cache, bits).float()
    return codes * scale


def pack_cache(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., head_dim] as the cache holds them: int8, or two of 4 bits in a uint8, each plus 8, the first low."""
    if bits == 8:
        return codes
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def unpack_cache(cache: Tensor, bits: int) -> Tensor:
    """The codes, int8 [..., head_dim], that `pack_cache` packed."""
    if bits == 8:
        return cache
    return torch.stack([cache & 15, cache >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
