"""Codes on a grid of integers as a function that can be trained: of where weights lie and of the range of each group.

Rounding passes gradients on as they are; clamping stops those that would move a value further out of the grid.
"""

import torch
from torch import Tensor

from .affine import grouped, ungrouped
from .formats import IntegerFormat, QuantizedWeight
from .grids import PER_TENSOR
from .straight_through import through

_TINY = torch.finfo(torch.float32).tiny


def round_through(x: Tensor) -> Tensor:
    """Half to even; the gradient is the identity."""
    return through(x, x.detach().round())


def range_of(w: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of every group, [N, G] each ([1, 1] for the whole tensor), zero between them."""
    parts = grouped(w, fmt)
    dims = (0, 1, 2) if fmt.group_size == PER_TENSOR else (2,)
    low, high = parts.amin(dims).clamp_max(0), parts.amax(dims).clamp_min(0)
    return (low.view(1, 1), high.view(1, 1)) if fmt.group_size == PER_TENSOR else (low, high)


def grid_of(low: Tensor, high: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover a range, as `weight_scales` has them: both float32, shaped as the range.

    Args:
        low, high: at most and at least 0.
    """
    spread = torch.maximum(high, -low) if fmt.symmetric else high - low
    scale = spread / fmt.qmax
    scale = kept_through(torch.where(scale < _TINY, torch.ones_like(scale), scale), fmt)
    if fmt.symmetric:
        return scale, None
    return scale, round_through(-low / scale).clamp(0, fmt.qmax)


def kept_through(scale: Tensor, fmt: IntegerFormat) -> Tensor:
    """Scales as the file keeps them; the gradient is the identity."""
    return through(scale, fmt.kept_scale(scale.detach())) if fmt.has_coarse_scales else scale


def codes_through(steps: Tensor, zero: Tensor | None, fmt: IntegerFormat) -> Tensor:
    """Codes of weights in steps, [N, G, group], as floats, zero point included."""
    codes = round_through(steps)
    if zero is not None:
        codes = codes + zero[..., None]
    return codes.clamp(fmt.qmin, fmt.qmax)


def values_through(steps: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntegerFormat, k: int) -> Tensor:
    """The weight [N, k] that the nearest codes stand for, with gradients for steps, scales and zero points.

    Args:
        steps: float32 [N, G, group], the weights over the scale, and whatever is added to them.
        scale, zero: as `grid_of` has them.
    """
    codes = codes_through(steps, zero, fmt)
    if zero is not None:
        codes = codes - zero[..., None]
    return ungrouped(codes * scale[..., None], k)


@torch.no_grad()
def codes_of(steps: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntegerFormat, k: int) -> QuantizedWeight:
    """The codes behind `values_through`, which gives what they dequantize to."""
    stored = torch.int8 if fmt.symmetric else torch.uint8
    codes = ungrouped(codes_through(steps, zero, fmt), k).to(stored).contiguous()
    return QuantizedWeight(codes, scale.detach(), None if zero is None else zero.detach().to(torch.uint8), fmt)


def slice_through(codes: Tensor, zero: Tensor | None, fmt: IntegerFormat, fewer: int) -> Tensor:
    """The upper bits of codes as `slicing.slice_codes` takes them, in the steps of the codes, around zero.

    Args:
        codes: as `codes_through` gives them; zero: float [N, G].
        fewer: bits to leave.
    """
    step = 1 << (fmt.bits - fewer)
    if zero is None:
        half = 1 << (fewer - 1)
        return round_through(codes / step).clamp(-half, half - 1) * step
    most, old = (1 << fewer) - 1, zero[..., None]
    around = round_through(old / step).clamp(0, most)
    return ((round_through((codes - old) / step) + around).clamp(0, most) - around) * step
