"""Weights in groups of few bits as int8 with one scale per output channel, for an integer matmul without inner scales.

The file keeps the small codes; the int8 ones are made when it is loaded. FPTQ (arXiv 2308.15987) runs fine-grained W4A8
this way, and CrossQuant's channel factor (arXiv 2410.07505) enters here, after the weight was rounded without it.
"""

import torch
from torch import Tensor

from .formats import QuantizedWeight

_QMAX = 127


def expanded_scale(weight: QuantizedWeight, factor: Tensor | None = None) -> Tensor:
    """The scale of each output channel, float32 [N]: absmax of the dequantized weight times factor, / 127.

    Args:
        factor: float32 [K], of the input features; None is 1.
    """
    values = weight.dequantize()
    if factor is not None:
        values.mul_(factor)
    scale = torch.maximum(values.amax(1), -values.amin(1)) / _QMAX
    return scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 1)


def channel_scale(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """The scale of each output channel by which int8 codes cover a weight in groups: its absmax / 127.

    Args: as `expand`.
    Returns:
        float32 [N]; 1 where the channel is zero.
    """
    values = _dequantized(codes, scale, zero_point, group_size)
    found = values.abs_().amax(0) / _QMAX
    return found.masked_fill_(found < torch.finfo(torch.float32).tiny, 1)


def expand_to_int8(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, factor: Tensor | None, row_scale: Tensor, group_size: int
) -> Tensor:
    """round((codes - zero_point) * scale * factor / row_scale), clamped to [-127, 127], in float32 in this order.

    Args:
        codes: int8 or uint8 [K, N].
        scale, zero_point: [G, N], one row for each group_size rows of codes.
        factor: float32 [K] or None.
        row_scale: float32 [N], see `expanded_scale`.
    Returns:
        int8 [K, N].
    """
    values = _dequantized(codes, scale, zero_point, group_size)
    if factor is not None:
        values *= factor[:, None]
    return values.div_(row_scale).round_().clamp_(-_QMAX, _QMAX).to(torch.int8)


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    k, n = codes.shape
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -k % group_size))  # the last group may be shorter
    values = filled.float().view(-1, group_size, n)
    if zero_point is not None:
        values -= zero_point.float()[:, None]
    return values.mul_(scale[:, None]).view(-1, n)[:k]
