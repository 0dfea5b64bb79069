"""Keys and values of attention in 8 or 4 bits: symmetric codes, calibrated scales, as GroupQueryAttention has them."""

import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def cache_scale(absmax: Tensor, bits: int) -> Tensor:
    """absmax / the largest code, float32 of absmax's shape.

    A channel where nothing but zeros was seen gets the widest scale of the others, as new data may wake it; 1 where all
    are such.
    """
    scale = absmax.float().masked_fill(absmax == 0, float(absmax.max())) / code_range(bits)[1]
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1)


def cache_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """round(x / scale), half to even, clamped; int8 of x's shape.

    Args:
        x: [batch, kv_heads, tokens, head_dim]; scale: float32 [kv_heads, 1, head_dim] or [1].
    """
    return torch.round(x.float() / scale).clamp_(*code_range(bits)).to(torch.int8)


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
