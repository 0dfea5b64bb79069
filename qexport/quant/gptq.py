"""GPTQ (arXiv 2210.17323): round a weight column by column and let the columns still to come absorb the error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import PER_TENSOR, IntegerCodes, QuantizedWeight, ScaledFormat, SteppedFormat
from .hessian import InverseFactor, factorize
from .strips import WIDTH, Grid, StripRounder

_BLOCK = 128  # columns whose errors reach all others in one product, and, within these, those of a strip the rest


def gptq_quantize(
    w: Tensor,
    hessian: Tensor | InverseFactor,
    fmt: SteppedFormat,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    clip_search: bool = False,
    block_size: int = _BLOCK,
) -> QuantizedWeight:
    """Quantize w so that tr((w - q) H (w - q)^T) is small.

    Scales are static: they come from the original weight, before any column is compensated, so `act_order` (columns by
    falling diag(H)) needs no group index and the codes are in the original order of features. Input features that were
    never active (a zero on the diagonal) are rounded to nearest: data says nothing about them, and other data may wake
    them (the paper's code sets their weights to zero instead). Damping is relative to the mean diagonal of the others,
    which makes the result independent of the scale of H.

    Args:
        w: float [N, K].
        hessian: float32 [K, K], symmetric, as `HessianStatistic.value` returns it; or what `factorize` made of it,
            which linears that read the same input share. Not modified.
        damp, act_order: as `factorize` takes them; a factor has them already.
        clip_search: take scales from `clipped_scales` with diag(H) as importance; features that were never active count
            as much as damping makes them count.
        block_size: columns compensated at once; changes speed and rounding of float32, nothing else.

    Raises:
        NumericsError: NaN or Inf, an all-zero Hessian, or one that cannot be factorized.
    """
    factor = hessian if isinstance(hessian, InverseFactor) else factorize(hessian, damp, act_order)
    return gptq_together([w], factor, [fmt], clip_search=clip_search, block_size=block_size)[0]


def gptq_together(
    weights: Sequence[Tensor], factor: InverseFactor, formats: Sequence[SteppedFormat], *, clip_search: bool = False,
    block_size: int = _BLOCK,
) -> list[QuantizedWeight]:  # fmt: skip
    """`gptq_quantize` of weights [N_i, K] whose linears read one value: the codes that each gets alone, in less time.

    Args:
        formats: of each.
    """
    formats = [fmt.for_weight(w) for w, fmt in zip(weights, formats, strict=True)]
    scales = [
        fmt.clipped_scales(w, factor.importance) if clip_search else fmt.scales(w)
        for w, fmt in zip(weights, formats, strict=True)
    ]
    order = factor.order.flip(0)
    grids = [
        _grid(fmt, scale, zero_point, order, w.shape)
        for w, fmt, (scale, zero_point) in zip(weights, formats, scales, strict=True)
    ]
    codes = _eliminate(weights, factor, grids, block_size)
    return [
        QuantizedWeight(found, scale, zero_point, fmt)
        for found, (scale, zero_point), fmt in zip(codes, scales, formats, strict=True)
    ]


def _eliminate(
    weights: Sequence[Tensor], factor: InverseFactor, grids: Sequence[Grid], block_size: int
) -> list[Tensor]:
    """Codes [N_i, K]; columns lie in the order of the factor, so they are eliminated from the last to the first.

    An error reaches the other columns of its strip when they are rounded, the rest of its block at the end of the strip
    and all others at the end of the block: what is done for single columns stays in the processor's cache.
    """
    order, inverse = factor.order.flip(0), factor.reversed
    # Columns of w become rows: every step below then reads and writes contiguous memory.
    columns = torch.cat([w.t()[order].float() for w in weights], dim=1)
    strips, k = StripRounder(grids, order), len(order)
    for stop in range(k, 0, -block_size):
        start = max(stop - block_size, 0)
        errors = torch.empty(stop - start, columns.shape[1], device=columns.device)
        block, rest = inverse[start:stop, start:stop], columns[start:stop]
        for high in range(stop - start, 0, -WIDTH):
            low = max(high - WIDTH, 0)
            strips.round(start + low, rest[low:high], block[low:high, low:high], errors[low:high])
            rest[:low].addmm_(block[low:high, :low].t(), errors[low:high], alpha=-1)
        columns[:start].addmm_(inverse[start:stop, :start].t(), errors, alpha=-1)
    return [codes.t().contiguous() for codes in strips.codes]


def _grid(fmt: SteppedFormat, scale: Tensor, zero_point: Tensor | None, order: Tensor, shape: Sequence[int]) -> Grid:
    """The codes of a weight [N, K] whose columns are rounded in this order, from the last to the first."""
    n, k = shape
    groups = torch.div(order, k if fmt.group_size <= 0 else fmt.group_size, rounding_mode="floor")
    scale = scale.t().expand(-1, n if fmt.group_size == PER_TENSOR else -1).contiguous()
    zero = None if zero_point is None else zero_point.t().float().expand(-1, scale.shape[1]).contiguous()
    if isinstance(fmt, IntegerCodes):
        if (levels := fmt.levels()) is not None:
            return Grid(scale, None, groups, levels=levels, signed=fmt.symmetric)
        return Grid(scale, zero, groups, fmt.qmin, fmt.qmax, signed=fmt.symmetric)
    if isinstance(fmt, ScaledFormat):
        return Grid(scale, None, groups, levels=fmt)
    raise TypeError(f"the steps of {type(fmt).__name__} are not known")
