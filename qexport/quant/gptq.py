"""GPTQ (arXiv 2210.17323): round a weight column by column and let the columns still to come absorb the error."""

import torch
from torch import Tensor

from ..errors import NumericsError, RecipeError
from .affine import search_clip, weight_scales
from .formats import PER_TENSOR, IntegerFormat, QuantizedWeight

_DAMP_TRIES = 4
_DATA_REMEDY = "Check the calibration data and the model"


class HessianStatistic:
    """Streams the Hessian of a linear's squared output error: H = 2/n * sum over tokens of w_t * x_t x_t^T.

    Some decoders have a few tokens (attention sinks) whose activations are hundreds of times larger than the rest. They
    then own H and GPTQ does worse than rounding to nearest. "token_norm" divides every token by its L2 norm raised to
    `exponent`, so that each counts by its direction.

    Attributes:
        weighting: "none" or "token_norm".
        exponent: 1 makes all tokens equal, 0 is "none".
        tokens: tokens seen so far, all-zero ones included.
    """

    def __init__(self, weighting: str = "none", exponent: float = 1.0):
        if weighting not in ("none", "token_norm"):
            raise RecipeError(f"unknown token weighting {weighting!r}", remedy='Use "none" or "token_norm"')
        self.weighting, self.exponent, self.tokens = weighting, exponent, 0
        self._sum: Tensor | None = None

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add x, float [tokens, K]; `weight`, non-negative [tokens], multiplies each token's contribution.

        Raises:
            NumericsError: x or weight has NaN or Inf.
        """
        x, factor = x.float(), None if weight is None else weight.sqrt()
        if self.weighting == "token_norm":
            scaling = torch.linalg.vector_norm(x, dim=-1).pow_(-self.exponent)
            # An all-zero token has no direction: it contributes nothing instead of 0/0.
            scaling.masked_fill_(torch.isinf(scaling), 0)
            factor = scaling if factor is None else factor * scaling
        if factor is not None:
            x = x * factor[:, None]
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], x.shape[1])
        self._sum.addmm_(x.t(), x)
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise NumericsError("the input of a linear has NaN or Inf", remedy=_DATA_REMEDY)
        self.tokens += x.shape[0]

    def unseen(self) -> Tensor:
        """Whether a feature was zero for every token, bool [K]; raises as `value`."""
        if self._sum is None:
            raise _no_token()
        return self._sum.diagonal() == 0

    def value(self) -> Tensor:
        """H, float32 [K, K].

        Raises:
            NumericsError: no token was seen.
        """
        if self._sum is None or not self.tokens:
            raise _no_token()
        return self._sum * (2 / self.tokens)


def gptq_quantize(
    w: Tensor,
    hessian: Tensor,
    fmt: IntegerFormat,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    clip_search: bool = False,
) -> QuantizedWeight:
    """Quantize w so that tr((w - q) H (w - q)^T) is small.

    Scales are static: they come from the original weight, before any column is compensated, so `act_order` (columns by
    falling diag(H)) needs no group index and the codes are in the original order of features. Input features that were
    never active (a zero on the diagonal) are rounded to nearest: data says nothing about them, and other data may wake
    them (the paper's code sets their weights to zero instead). Damping is relative to the mean diagonal of the others,
    which makes the result independent of the scale of H.

    Args:
        w: float [N, K].
        hessian: float32 [K, K], symmetric, as `HessianStatistic.value` returns it; not modified.
        damp: share of the mean diagonal added to the diagonal; 10, 100 and 1000 times that if H cannot be factorized.
        block_size: columns compensated at once; changes speed and rounding of float32, nothing else.
        clip_search: take scales from `search_clip` with diag(H) as importance; features that were never active count
            as much as damping makes them count.
    Raises:
        NumericsError: NaN or Inf, an all-zero Hessian, or one that cannot be factorized.
    """
    n, k = w.shape
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if not bool(torch.isfinite(hessian).all()):
        raise NumericsError("the Hessian has NaN or Inf", remedy=_DATA_REMEDY)
    if bool(dead.all()):
        remedy = "Use more calibration data, or round this weight to nearest"
        raise NumericsError("the Hessian is zero: no calibration token activates the linear", remedy=remedy)
    if clip_search:
        importance = diagonal.masked_fill(dead, damp * _mean_of_seen(diagonal, dead))
        scale, zero_point = search_clip(w, fmt, importance)
    else:
        scale, zero_point = weight_scales(w, fmt)

    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k, device=w.device)
    factor = _inverse_factor(hessian, dead, order, damp)
    # Columns of w become rows: every step below then reads and writes contiguous memory.
    columns = w.t()[order].float()
    codes = torch.empty(k, n, dtype=torch.int8 if fmt.symmetric else torch.uint8, device=w.device)
    group_width = k if fmt.group_size <= 0 else fmt.group_size
    groups = torch.div(order, group_width, rounding_mode="floor").tolist()
    positions = order.tolist()
    scale_of = scale.t().expand(-1, n if fmt.group_size == PER_TENSOR else -1).contiguous()
    zero_of = None if zero_point is None else zero_point.t().float().expand(-1, scale_of.shape[1]).contiguous()

    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        errors = torch.empty(stop - start, n, device=w.device)
        block = factor[start:stop, start:stop]
        pivots = block.diagonal().tolist()
        for j in range(stop - start):
            column = columns[start + j]
            if j:
                column = torch.addmv(column, errors[:j].t(), block[:j, j], alpha=-1)
            group = groups[start + j]
            steps = torch.div(column, scale_of[group]).round_()
            if zero_of is None:
                steps.clamp_(fmt.qmin, fmt.qmax)
                codes[positions[start + j]] = steps
            else:
                steps.add_(zero_of[group]).clamp_(fmt.qmin, fmt.qmax)
                codes[positions[start + j]] = steps
                steps.sub_(zero_of[group])
            torch.sub(column, steps.mul_(scale_of[group]), out=errors[j]).div_(pivots[j])
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return QuantizedWeight(codes.t().contiguous(), scale, zero_point, fmt)


def _inverse_factor(hessian: Tensor, dead: Tensor, order: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, rows and columns in the given order.

    With J the reversal of all indices, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and U = R^-1:
    one factorization and one triangular solve, without forming the inverse.
    """
    mean = _mean_of_seen(hessian.diagonal(), dead)
    reverse = order.flip(0)
    flipped = hessian[reverse[:, None], reverse].float()
    flipped.diagonal().masked_fill_(dead[reverse], mean)
    diagonal = flipped.diagonal().clone()
    for attempt in range(_DAMP_TRIES):
        flipped.diagonal().copy_(diagonal + damp * 10**attempt * mean)
        for dtype in (torch.float32, torch.float64):
            lower, info = torch.linalg.cholesky_ex(flipped.to(dtype))
            if int(info) == 0:
                identity = torch.eye(len(order), dtype=dtype, device=hessian.device)
                lower = lower.flip(0, 1)
                upper: Tensor = torch.linalg.solve_triangular(lower, identity, upper=True)
                if bool(torch.isfinite(upper.diagonal()).all()):
                    return upper.float()
    raise NumericsError(
        f"the Hessian cannot be factorized, even with {10 ** (_DAMP_TRIES - 1)} times the damping of {damp}",
        remedy="Use more calibration data, raise the damping, or round to nearest",
    )


def _no_token() -> NumericsError:
    return NumericsError("no calibration token reached the linear", remedy="Use more calibration data")


def _mean_of_seen(diagonal: Tensor, dead: Tensor) -> float:
    return float(diagonal[~dead].double().mean())
