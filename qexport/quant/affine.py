"""Integer grids: scales, codes and the way back, for weights and for activations.

Every rounding is half to even and every division is a real float32 division, because that is what ONNX Runtime's
QuantizeLinear does; multiplying by a reciprocal moves values that lie close to a tie.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NumericsError
from .grids import PER_TENSOR, ActivationFormat, AffineGrid, GroupedCodes

# Elements worked on at once: one megabyte of float32 stays in the second-level cache through all passes over it.
CHUNK = 1 << 18
FINITE_REMEDY = "Check the checkpoint, and load it in float32 if it was cast to float16"


def weight_scales(w: Tensor, fmt: AffineGrid, clip: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the range of every group, or `clip` times that range.

    Symmetric: absmax / qmax, so a full range never uses the code -qmax - 1. Asymmetric: (max - min) / (2^bits - 1) with
    zero inside the range. A group whose scale would be zero or subnormal gets scale 1 (and code 0).

    Args:
        w: float [N, K].
    Returns:
        scale float32 [N, G], zero_point uint8 [N, G] or None.
    Raises:
        NumericsError: w has NaN or Inf, or a range beyond float32.
    """
    return _scales(*_ranges(w, fmt), fmt, clip)


def encode(w: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: AffineGrid) -> Tensor:
    """Codes [N, K] of the nearest grid points, clamped to [fmt.qmin, fmt.qmax]; w must be finite."""
    codes = torch.empty(w.shape, dtype=torch.int8 if fmt.symmetric else torch.uint8, device=w.device)
    for rows, chunk in row_chunks(w, fmt):
        steps = torch.div(chunk, _rows_of(scale, rows)).round_()
        if zero_point is not None:
            steps.add_(_rows_of(zero_point, rows))
        codes[rows] = ungrouped(steps.clamp_(fmt.qmin, fmt.qmax), w.shape[1]).to(codes.dtype)
    return codes


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: AffineGrid) -> Tensor:
    """(codes - zero_point) * scale, float32 [N, K]."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows, chunk in row_chunks(codes, fmt):
        values = chunk.float()
        if zero_point is not None:
            values.sub_(_rows_of(zero_point, rows).float())
        out[rows] = ungrouped(values.mul_(_rows_of(scale, rows)), out.shape[1])
    return out


def search_clip(
    w: Tensor, fmt: AffineGrid, importance: Tensor | None = None, steps: int = 20
) -> tuple[Tensor, Tensor | None]:
    """For every group, the scale and zero point with the least squared rounding error over a grid of clipping ratios.

    The ratios go from 1 to 0.5 in `steps` equal steps (AWQ, arXiv 2306.00978, searches the same interval); ties go to
    the widest range. Clamping keeps the code -qmax - 1, so a group whose largest weight is negative can use a ratio of
    7/8 at 4 bits without clipping anything.

    Args:
        w: float [N, K].
        importance: non-negative [K], the weight of an input feature's squared error, for example mean(x_j^2) or the
            diagonal of a Hessian; None: all equal.
    Returns:
        scale float32 [N, G], zero_point uint8 [N, G] or None.
    Raises:
        NumericsError: NaN, Inf or an impossible importance.
    """
    lo, hi = _ranges(w, fmt)
    ratios = [1 - 0.5 * i / steps for i in range(steps + 1)]
    clips = torch.tensor(ratios, device=w.device)[:, None, None]
    if importance is not None:
        if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
            raise NumericsError("the importance of an input feature is negative, NaN or Inf")
        importance = grouped(importance.float()[None], fmt)[0]
    errors = torch.zeros(len(ratios), dtype=torch.float64, device=w.device)
    best = torch.ones_like(lo)
    for rows, chunk in row_chunks(w, fmt):
        low, high = _rows_of(lo, rows), _rows_of(hi, rows)
        least = torch.full(chunk.shape[:2], torch.inf, device=w.device)
        # Of all ratios at once: they are few numbers, and every step of making them costs a call.
        scales, zero_points = _scales(low[..., 0], high[..., 0], fmt, clips)
        for i, ratio in enumerate(ratios):
            error = _rounding_error(chunk, scales[i], None if zero_points is None else zero_points[i], fmt, importance)
            if fmt.group_size == PER_TENSOR:
                errors[i] += error.sum(dtype=torch.float64)
            else:
                better = error < least
                least = torch.where(better, error, least)
                best[rows].masked_fill_(better, ratio)
    if fmt.group_size == PER_TENSOR:
        best.fill_(ratios[int(errors.argmin())])
    return _scales(lo, hi, fmt, best)


def static_scale(absmax: float, fmt: ActivationFormat) -> float:
    """absmax / qmax rounded to float32, or 1 for a tensor that is always zero.

    Raises:
        NumericsError: absmax is negative, NaN or Inf.
    """
    scale = torch.tensor(absmax, dtype=torch.float32) / fmt.qmax
    if not 0 <= float(scale) < torch.inf:
        raise NumericsError(f"an activation has the range {absmax}", remedy="Check the calibration data and the model")
    return float(scale) if scale >= torch.finfo(torch.float32).tiny else 1.0


def blockwise_fake_quantize(x: Tensor, block_size: int) -> Tensor:
    """What ONNX Runtime's MatMulNBits with accuracy level 4 does to its input: int8 per row and block of features.

    Each run of `block_size` features of a row (the last may be shorter) becomes round(x * (127 / absmax)) steps of
    absmax / 127, all in float32. The multiplication by the reciprocal is deliberate: dividing by the step puts about
    one value in a million on the neighbouring code. A block so small that 127 / absmax overflows becomes zero.

    Args:
        x: float [..., K].
    Returns:
        the same shape and dtype.
    """
    features = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -features % block_size))
    blocks = padded.view(*x.shape[:-1], -1, block_size)
    absmax = torch.maximum(blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True).neg_())
    # Not `127 / absmax`: for a number over a tensor torch multiplies the reciprocal, which rounds twice.
    inverse = torch.full_like(absmax, 127).div_(absmax)
    inverse.masked_fill_(torch.isinf(inverse), 0)
    values = torch.mul(blocks, inverse).round_().mul_(absmax.div_(127))
    return values.view(padded.shape)[..., :features].to(x.dtype)


def _ranges(w: Tensor, fmt: AffineGrid) -> tuple[Tensor, Tensor]:
    if fmt.group_size == PER_TENSOR:
        return w.amin().float().view(1, 1), w.amax().float().view(1, 1)
    parts = grouped(w, fmt)
    return parts.amin(-1).float(), parts.amax(-1).float()


def _scales(lo: Tensor, hi: Tensor, fmt: AffineGrid, clip: float | Tensor) -> tuple[Tensor, Tensor | None]:
    tiny = torch.finfo(torch.float32).tiny
    if fmt.symmetric:
        scale, zero_point = torch.maximum(hi, -lo) * clip / fmt.qmax, None
    else:
        lo = lo.clamp_max(0) * clip
        scale = (hi.clamp_min(0) * clip - lo) / fmt.qmax
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError("the weight has NaN or Inf, or a range beyond float32", remedy=FINITE_REMEDY)
    scale = fmt.kept_scale(scale.masked_fill_(scale < tiny, 1))
    if not fmt.symmetric:
        zero_point = torch.round(-lo / scale).clamp_(0, fmt.qmax).to(torch.uint8)
    return scale, zero_point


def _rounding_error(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: AffineGrid, importance: Tensor | None
) -> Tensor:
    """Weighted squared error of every group, [rows, G], for w [rows, G, group]."""
    steps = torch.div(w, scale[..., None])
    nearest = torch.round(steps)
    if zero_point is None:
        nearest.clamp_(fmt.qmin, fmt.qmax)
    else:
        zero = zero_point[..., None].float()
        nearest.clamp_(-zero, fmt.qmax - zero)
    steps.sub_(nearest).square_()
    if importance is not None:
        steps.mul_(importance)
    return steps.sum(-1).mul_(scale).mul_(scale)


def row_chunks(w: Tensor, fmt: GroupedCodes) -> Iterator[tuple[slice, Tensor]]:
    """Rows of w [N, K] in pieces that fit the cache, each as [rows, G, group]."""
    for rows in row_slices(*w.shape):
        yield rows, grouped(w[rows], fmt)


def grouped(w: Tensor, fmt: GroupedCodes) -> Tensor:
    """w [N, K] as [N, G, group], the last group filled up with zeros, which every grid has and no range misses."""
    n, k = w.shape
    missing = -k % fmt.group_size if fmt.group_size > 0 else 0
    return (torch.nn.functional.pad(w, (0, missing)) if missing else w).reshape(n, fmt.groups(k), -1)


def ungrouped(values: Tensor, k: int) -> Tensor:
    """[N, G, group] as [N, k], without what `grouped` filled up."""
    return values.reshape(values.shape[0], -1)[:, :k]


def row_slices(n: int, k: int) -> list[slice]:
    """The rows of a matrix [n, k] in pieces that fit the cache."""
    step = max(1, CHUNK // k)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _rows_of(per_group: Tensor, rows: slice) -> Tensor:
    """The scales or zero points of some rows, ready to broadcast over [rows, G, group]."""
    return (per_group if per_group.shape[0] == 1 else per_group[rows])[..., None]
