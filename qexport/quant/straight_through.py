"""Rounding that training can see through, and the training of one weight with it (ZeroQuant-V2, arXiv 2303.08302).

Rounding has no useful derivative. The straight-through estimator takes it for the identity on the way back: a gradient
with respect to the rounded weight moves the float weight, the latent one, until codes flip. Scales are computed from
the latent weight at every step and are constants on the way back, so what is trained is what plain rounding makes of
the result afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .affine import grouped, ungrouped, weight_scales
from .grids import PER_TENSOR, ActivationFormat, AffineGrid
from .zero_fraction import token_range

_SQUARES, _SMALL = 0.999, 1e-12
# Near a threshold codes flip back and forth with every update: the error settles as updates become smaller. Of powers
# from 1 to 5 of the steps left and of the cosine, this one leaves the least error for a given number of steps.
_DECAY = 4
# Elements worked on at once, so that temporaries stay in the cache, but enough rows for one reading of the Hessian.
_CHUNK, _ROWS = 1 << 17, 128
_SAMPLE = 32  # rows on which learning rates are compared
# The error falls late, as updates shrink: after this share of the steps training ends when the best error fell by less
# than a thousandth in a tenth of the steps.
_LATE, _PROGRESS, _PATIENCE = 0.8, 1e-3, 10


class _Rounded(torch.autograd.Function):
    """Forward a value computed elsewhere, backward the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def through(x: Tensor, value: Tensor) -> Tensor:
    """A value made of x, whose gradient is that of x; nothing else of how it was made counts."""
    found: Tensor = _Rounded.apply(x, value)
    return found


def round_weight(w: Tensor, fmt: AffineGrid) -> Tensor:
    """What `IntegerFormat.rounded` gives to the bit, without the codes; raises what that raises."""
    scale, zero_point = weight_scales(w, fmt)
    scale = scale[..., None]
    steps = torch.div(grouped(w, fmt), scale).round_()
    if zero_point is None:
        steps.clamp_(fmt.qmin, fmt.qmax)
    else:
        zero = zero_point[..., None].float()
        steps.add_(zero).clamp_(fmt.qmin, fmt.qmax).sub_(zero)
    return ungrouped(steps.mul_(scale), w.shape[1])


def fake_quantize_weight(w: Tensor, fmt: AffineGrid) -> Tensor:
    """`round_weight` whose gradient is the identity everywhere.

    Scales cover the range of the weight they are computed from, so that only asymmetric grids clamp, by no more than
    the half step to which their zero point was rounded: there is nothing to stop a gradient for.

    Args:
        w: float32 [N, K].
    Returns:
        float32 [N, K].
    """
    return through(w, round_weight(w.detach(), fmt))


def fake_quantize_tokens(x: Tensor, fmt: ActivationFormat, factors: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Dynamic per-token rounding as the deployed graph does it, whose gradient is the identity: nothing is clamped.

    Args:
        x: float32 [..., K].
        factors, alpha: as `kernel.token_range`.
    Returns:
        float32 [..., K].
    """
    with torch.no_grad():
        step = (token_range(x, factors, alpha) * (1.0 / fmt.qmax)).clamp_min(1e-8)
        value = torch.div(x, step).round_().mul_(step)
    return through(x, value)


class Descent:
    """Adam (arXiv 1412.6980) without its first moment, for one latent weight.

    A straight-through gradient changes sign when a code flips. A running mean of gradients carries a weight on past
    that point: with Adam's usual 0.9 half as much again of the error is left. The running mean of squares stays.

    Args:
        latent: float32, changed in place by `update`.
        unit: what a learning rate is measured in, the mean step between codes.
        squares: the share of the running mean of squares that a step keeps.
    """

    def __init__(self, latent: Tensor, unit: float, squares: float = _SQUARES) -> None:
        self._latent, self._unit, self._moment, self._done = latent, unit, torch.zeros_like(latent), 0
        self._squares = squares

    @torch.no_grad()
    def update(self, gradient: Tensor, rate: float) -> None:
        """Go `rate` units or so against a gradient of the latent's shape."""
        self._done += 1
        self._moment.mul_(self._squares).addcmul_(gradient, gradient, value=1 - self._squares)
        rate *= self._unit * (1 - self._squares**self._done) ** 0.5
        self._latent.addcdiv_(gradient, self._moment.sqrt().add_(_SMALL), value=-rate)


def mean_step(w: Tensor, fmt: AffineGrid) -> float:
    """The mean step between codes of a weight [N, K]."""
    return float(weight_scales(w.detach(), fmt)[0].mean())


@dataclass(frozen=True, eq=False)
class TrainedWeight:
    """A weight to be rounded to nearest.

    Attributes:
        weight: float32 [N, K].
        error: tr((w - q) H (w - q)^T) of the trained weight over that of the original, q the rounded one; at most 1.
        learning_rate: the one kept, None where none improved on the original.
        steps: updates done with it.
    """

    weight: Tensor
    error: float
    learning_rate: float | None
    steps: int


def train_weight(
    w: Tensor, hessian: Tensor, fmt: AffineGrid, learning_rates: Sequence[float], steps: int
) -> TrainedWeight:
    """Find a latent weight near w whose rounding has a small squared output error: ZQ-Local.

    With q = round_weight(v, fmt) the error tr((w - q) H (w - q)^T) has the gradient 2 (q - w) H with respect to q,
    which goes straight through to v. Rows do not know of each other (unless the format has one scale for the tensor),
    so each keeps the best v that it has met, w included, and learning rates are compared on a few rows; where none of
    them gains anything there, the weight stays as it is.

    Args:
        w: float32 [N, K].
        hessian: float32 [K, K], symmetric, not zero, as `HessianStatistic.value` returns it.
        learning_rates: of Adam (without first moment), as shares of the mean step between codes; they fall to 0.
        steps: updates with one rate; less where the error has stopped falling near their end.
    Raises:
        NumericsError: NaN or Inf in w.
    """
    hessian = hessian / hessian.diagonal().mean()  # Adam does not mind the size, its smallest denominator does
    unit, (n, k) = mean_step(w, fmt), w.shape
    whole, rates = fmt.group_size == PER_TENSOR, list(dict.fromkeys(learning_rates))
    if len(rates) > 1 and n > _SAMPLE and not whole:
        sample = w[torch.linspace(0, n - 1, _SAMPLE, dtype=torch.float64).round().long()]
        trials = [_descend(sample, hessian, fmt, rate, unit, steps) for rate in rates]
        errors = [float(trial[1].sum()) for trial in trials]
        if not min(errors) < float(trials[0][2].sum()):
            return TrainedWeight(w, 1.0, None, 0)
        rates = [rates[errors.index(min(errors))]]
    size = n if whole else max(_ROWS, _CHUNK // k)

    def trained(rate: float) -> TrainedWeight:
        parts = [_descend(rows, hessian, fmt, rate, unit, steps) for rows in w.split(size)]
        reached, started = sum(float(part[1].sum()) for part in parts), sum(float(part[2].sum()) for part in parts)
        error = reached / started if started > 0 else 1.0
        kept, done = torch.cat([part[0] for part in parts]), max(part[3] for part in parts)
        return TrainedWeight(kept, error, rate if error < 1 else None, done)

    return min(map(trained, rates), key=lambda found: found.error)


def _descend(
    w: Tensor, hessian: Tensor, fmt: AffineGrid, rate: float, unit: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Best latent weight met [N, K], its error by row [N] (one where rows share a scale), that of w, updates done."""
    latent, kept = w.clone(), w.clone()
    descent, best, history = Descent(latent, unit), torch.tensor(torch.inf), []
    for step in range(steps + 1):
        difference = round_weight(latent, fmt).sub_(w)
        gradient = difference @ hessian  # half of it
        error = difference.mul_(gradient).sum(1)
        error = error.sum(0, keepdim=True) if fmt.group_size == PER_TENSOR else error
        better = error < best
        if bool(better.any()):
            rows = better.expand(w.shape[0]).nonzero().squeeze(1)
            kept[rows] = latent[rows]
            best = torch.where(better, error, best)
        history.append(float(best.sum()))
        before = history[max(0, step - max(1, steps // _PATIENCE))]
        if step == steps or step > _LATE * steps and history[-1] > (1 - _PROGRESS) * before:
            break
        descent.update(gradient, rate * (1 - step / steps) ** _DECAY)
        if step == 0:
            first = error
    return kept, best, first, step
