"""Scales of 8 bits: the numbers of five significant bits from the 16 octaves below the largest of a row.

    scale = m * 2^k * 2^e,  m = 16 .. 31, k = -19 .. -4,  a byte 16 (k + 19) + (m - 16) for each, a byte e + 127 a row

So few bits do for a scale because it is rounded before the codes are: they make up for it (rounding normal weights to
the nearest of 4 bits in groups of 16 has .7 % more squared error, in groups of 128 .1 %). Double quantization (QLoRA,
arXiv 2305.14314) and the blocks of llama.cpp's K formats save the same bits. Every one of these numbers is a float16
and a bfloat16 too, if it is in their range.
"""

import torch
from torch import Tensor

from .small_floats import e8m0_values

_SIGNIFICANT, _OCTAVES = 5, 16
_BYTES = torch.arange(256, dtype=torch.uint8)


def coarse(scale: Tensor, dim: int = -1) -> Tensor:
    """The nearest such numbers.

    Args:
        scale: float32 [N, G], positive and normal.
        dim: that of the groups.
    """
    mantissa, exponent = torch.frexp(scale)  # in [1/2, 1)
    steps = 2**_SIGNIFICANT
    rounded = torch.ldexp((mantissa * steps).round_().div_(steps), exponent)
    return torch.maximum(rounded, _power_below(rounded.amax(dim, keepdim=True)) * 2.0 ** (1 - _OCTAVES))


def coarse_codes(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of such numbers.

    Args:
        scale: floating point [N, G], what `coarse` gave, cast or not.

    Returns:
        uint8 [N, G] of the numbers, uint8 [N, 1] of the rows.

    Raises:
        ValueError: one of them is no such number.
    """
    scale, rows = scale.float(), coarse_rows(scale)
    mantissa, exponent = torch.frexp(scale / e8m0_values(rows))  # a division by a power of two
    significant = 2 ** (_SIGNIFICANT - 1)
    codes = (exponent - 2 + _OCTAVES) * significant + (mantissa * 2 * significant - significant)
    byte = codes.clamp(0, 255).to(torch.uint8)
    if not torch.equal(coarse_values(byte, rows), scale):
        raise ValueError("scales that no 8 bits stand for")
    return byte, rows


def coarse_rows(scale: Tensor) -> Tensor:
    """The bytes of the rows alone: uint8 [N, 1]; scale: as of `coarse_codes`."""
    return (torch.frexp(scale.float().amax(-1, keepdim=True)).exponent - 1 + 127).to(torch.uint8)


def coarse_values(codes: Tensor, rows: Tensor) -> Tensor:
    """The numbers of bytes, float32 [N, G]; arguments: as `coarse_codes` returns them."""
    return coarse_table().to(codes.device)[codes.int()] * e8m0_values(rows)


def coarse_table() -> Tensor:
    """The number of each byte in a row whose byte is 127: float32 [256], from 2^-15 to 31/16."""
    significant = 2 ** (_SIGNIFICANT - 1)
    codes = _BYTES.int()
    return torch.ldexp(1 + (codes % significant) / significant, codes // significant + 1 - _OCTAVES)


def _power_below(number: Tensor) -> Tensor:
    """The largest power of two that is not above it."""
    return torch.ldexp(torch.ones_like(number), torch.frexp(number).exponent - 1)
