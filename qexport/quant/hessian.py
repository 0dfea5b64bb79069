"""The Hessian of a linear's squared output error, summed up token by token, and the factor of its inverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ranks
from ..errors import NumericsError, RecipeError
from .triangular import invert_lower_

_DAMP_TRIES = 4
_DATA_REMEDY = "Check the calibration data and the model"
_PANEL = 512  # rows of the sum that are updated together: what lies left of their diagonal block is left out


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
        self._whole = True  # else what lies left of the diagonal's panels is still to be mirrored

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
        for start in range(0, x.shape[1], _PANEL):  # H is symmetric: nearly half of the arithmetic can stay undone
            panel = slice(start, start + _PANEL)
            self._sum[panel, start:].addmm_(x[:, panel].t(), x[:, start:])
        self._whole = False
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise NumericsError("the input of a linear has NaN or Inf", remedy=_DATA_REMEDY)
        self.tokens += x.shape[0]

    def across(self) -> None:
        """Add what other processes have summed, see `ranks.combine`."""
        sizes = [size for size in ranks.gather(None if self._sum is None else len(self._sum)) if size is not None]
        if sizes:
            own = torch.zeros(sizes[0], sizes[0]) if self._sum is None else self._sum
            self._sum, self._whole = ranks.total(own), False
        self.tokens = sum(ranks.gather(self.tokens))

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
        return self.total() * (2 / self.tokens)

    def take(self) -> Tensor:
        """What `total` gives, forgotten here: its memory is free when who takes it is done with it."""
        total, self._sum = self.total(), None
        return total

    def total(self) -> Tensor:
        """H times n/2, in the statistic's own memory: GPTQ does not depend on the size of H, and H may be gigabytes.

        Raises:
            NumericsError: no token was seen.
        """
        if self._sum is None or not self.tokens:
            raise _no_token()
        if not self._whole:
            _mirror(self._sum)
            self._whole = True
        return self._sum


@dataclass(frozen=True)
class InverseFactor:
    """The triangular factor of a damped Hessian's inverse, (H + damping)^-1 = U^T U, in the order of elimination.

    Rows and columns are kept from the last to the first, because Cholesky's factor of H itself in that order is U^-1:
    one factorization and one triangular inverse, in one place of memory, without forming the inverse of H.

    Attributes:
        order: int64 [K], input features in the order in which they are rounded.
        reversed: float32 [K, K], lower triangular, U[i, j] = reversed[K-1-i, K-1-j].
        importance: float32 [K], diag(H), of features that were never active what damping puts there.
    """

    order: Tensor
    reversed: Tensor
    importance: Tensor

    @property
    def squared_pivots(self) -> Tensor:
        """Of each input feature the square of its entry on the diagonal of U, float32 [K]: an error of a weight there,
        over it, is what it costs when the weights still to come have absorbed what they can."""
        squares = torch.empty_like(self.importance)
        squares[self.order.flip(0)] = self.reversed.diagonal().square()
        return squares


def factorize(hessian: Tensor, damp: float, act_order: bool) -> InverseFactor:
    """Factorize the inverse of a Hessian; features that were never active get the mean diagonal.

    Two matrices of this size are in memory where nobody else holds the Hessian: it is dropped when it has been ordered.

    Args:
        hessian: float32 [K, K], symmetric; not modified.
        damp: share of the mean diagonal of the features that were active, which is added to the diagonal; 10, 100 and
            1000 times that if H cannot be factorized.
        act_order: features by falling diagonal, else as they are.

    Raises:
        NumericsError: NaN or Inf, an all-zero Hessian, or one that cannot be factorized.
    """
    diagonal = hessian.diagonal().clone()
    if not finite(hessian):
        raise NumericsError("the Hessian has NaN or Inf", remedy=_DATA_REMEDY)
    dead = diagonal == 0
    if bool(dead.all()):
        remedy = "Use more calibration data, or round this weight to nearest"
        raise NumericsError("the Hessian is zero: no calibration token activates the linear", remedy=remedy)
    mean = float(diagonal[~dead].double().mean())
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    ordered = hessian[reverse[:, None], reverse].float()
    del hessian
    factor = _factor(ordered, diagonal[reverse], dead[reverse], damp, mean)
    return InverseFactor(order, factor, diagonal.masked_fill(dead, damp * mean))


def _factor(hessian: Tensor, diagonal: Tensor, dead: Tensor, damp: float, mean: float) -> Tensor:
    """The factor, in the memory of the ordered Hessian; diagonal: what is on that without damping."""
    for attempt in range(_DAMP_TRIES):
        for dtype in (torch.float32, torch.float64):
            matrix = hessian.to(dtype)
            damped = diagonal.to(dtype).masked_fill(dead, mean).add_(damp * 10**attempt * mean)
            matrix.diagonal().copy_(damped)
            lower, info = torch.linalg.cholesky_ex(matrix)
            # The diagonal of a triangular inverse is that of the matrix, inverted.
            if int(info) == 0 and bool(torch.isfinite(lower.diagonal().reciprocal()).all()):
                matrix.copy_(lower)  # whose columns lie one after another, while products want rows
                del lower
                invert_lower_(matrix)
                return matrix.float()
    raise NumericsError(
        f"the Hessian cannot be factorized, even with {10 ** (_DAMP_TRIES - 1)} times the damping of {damp}",
        remedy="Use more calibration data, raise the damping, or round to nearest",
    )


def finite(matrix: Tensor) -> bool:
    """Whether no entry is NaN or Inf: by sums, which is cheaper by far than to look at each, of a few rows at a time,
    because PyTorch copies what it sums up in another type."""
    return all(bool(torch.isfinite(rows.sum(dtype=torch.float64))) for rows in matrix.split(_PANEL))


def _mirror(upper: Tensor) -> None:
    """Complete a symmetric matrix of which only the panels right of the diagonal are known."""
    for start in range(_PANEL, len(upper), _PANEL):
        panel = slice(start, start + _PANEL)
        upper[panel, :start] = upper[:start, panel].t()


def _no_token() -> NumericsError:
    return NumericsError("no calibration token reached the linear", remedy="Use more calibration data")
