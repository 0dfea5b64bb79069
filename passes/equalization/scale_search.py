"""Choosing a factor by what counts: the error of the outputs of the linears that read the value, on a sample of tokens.

AWQ (arXiv 2306.00978) searches its exponent so; the exponents of SmoothQuant and CrossQuant can be found the same way.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import PlainValidator
from torch import Tensor

from ...errors import NumericsError
from ...quant.fake import fake_activation, fake_folded_weight
from ...quant.formats import PER_TENSOR, ActivationFormat, Scheme
from ...quant.zero_fraction import token_step

# Steps of 0.05 would lower the errors by about one percent more.
ALPHAS = tuple(i / 10 for i in range(11))
_TOKENS = 256
_PIECE = 1 << 22  # elements of a weight worked on at once


def _alpha(value: Any) -> float | str:
    if value == "search":
        return "search"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"not a number from 0 to 1, nor search: {value!r}", "Write 0.5, or search")


# An exponent in a recipe: a number, or "search" for the one with the least output error at each place.
Alpha = Annotated[float | str, PlainValidator(_alpha)]


def number(alpha: float | str) -> float | None:
    """The number of an `Alpha`; None where it is to be searched."""
    return alpha if isinstance(alpha, float) else None


@dataclass(frozen=True)
class BestScale:
    """The best candidate.

    Attributes:
        value: the candidate.
        error: squared output error with its factors; without: with no factor at all.
    """

    value: float
    error: float
    without: float

    @property
    def helps(self) -> bool:
        """Whether its factors are better than none, by more than the rounding of this sum."""
        return self.error < (1 - 1e-5) * self.without

    def data(self) -> dict[str, Any]:
        """For the report."""
        ratio = self.error / self.without if self.without else 1.0
        return {"alpha": self.value, "error relative to no factor": round(ratio, 4)}


def best(
    candidates: Iterable[float],
    factors_of: Callable[[float], Tensor],
    rows: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme | None],
    *,
    absmax: Tensor | None = None,
    weights_unscaled: bool = False,
    paper_rows: bool = False,
) -> BestScale:
    """The candidate with the least sum over linears of || Q(X / s) Q(W diag(s))^T - X W^T ||^2; the first of equals.

    Q rounds to nearest in the formats of each linear's scheme. Linears without a scheme have no error. Of more than 256
    tokens, evenly spaced ones are used.

    Args:
        candidates: such as exponents.
        factors_of: positive factors s [K] of a candidate, for the linears' input features.
        rows: X, float [tokens, K].
        weights: W, float [N_i, K] of each linear; schemes: of each linear.
        absmax: the largest magnitude of each feature over all data, [K], for static ranges; None: those of the rows.
        weights_unscaled: the weight is rounded without s and carries it afterwards: Q(W) diag(s).
        paper_rows: candidates are CrossQuant's alpha (arXiv 2410.07505), and the step of a token has its row scale.
    Raises:
        NumericsError: NaN or Inf.
    """
    rows = rows[:: math.ceil(rows.shape[0] / _TOKENS)]
    reach = rows.abs().amax(0) if absmax is None else absmax
    linears = [_Linear(rows, w, scheme) for w, scheme in zip(weights, schemes, strict=True) if scheme is not None]

    def error(factors: Tensor, candidate: float | None = None) -> float:
        power = candidate if paper_rows and candidate is not None else None
        inputs = _Inputs(rows, factors, reach, power)
        return sum(linear.error(inputs, factors, weights_unscaled) for linear in linears)

    without = error(torch.ones_like(rows[0]))
    errors = {candidate: error(factors_of(candidate), candidate) for candidate in candidates}
    value = min(errors, key=errors.__getitem__)
    if not all(map(math.isfinite, (without, *errors.values()))):
        raise NumericsError("the output of a linear has NaN or Inf", remedy="Check the calibration data and the model")
    return BestScale(value, errors[value], without)


class _Inputs:
    """X / s in each format that is asked for, made once."""

    def __init__(self, rows: Tensor, factors: Tensor, reach: Tensor, power: float | None) -> None:
        self._scaled, self._factors, self._power = rows / factors, factors, power
        self._absmax = float((reach / factors).amax())
        self._made: dict[ActivationFormat | None, Tensor] = {}

    def quantized(self, fmt: ActivationFormat | None) -> Tensor:
        if fmt not in self._made:
            step = None
            if fmt is not None and self._power is not None:
                step = token_step(self._scaled, fmt, self._factors, self._power)
            self._made[fmt] = fake_activation(self._scaled, fmt, self._absmax, step)
        return self._made[fmt]


class _Linear:
    """A linear and what it gives in float."""

    def __init__(self, rows: Tensor, weight: Tensor, scheme: Scheme) -> None:
        self._scheme = scheme
        # One scale for the tensor needs all of it; other scales are a row's own.
        step = weight.shape[0] if scheme.weight.group_size == PER_TENSOR else max(1, _PIECE // weight.shape[1])
        self._pieces = [(w.float(), rows @ w.float().t()) for w in weight.split(step)]

    def error(self, inputs: _Inputs, factors: Tensor, weights_unscaled: bool) -> float:
        x, total = inputs.quantized(self._scheme.activation), 0.0
        for weight, target in self._pieces:
            quantized = fake_folded_weight(weight, factors, self._scheme.weight, weights_unscaled)
            total += float((x @ quantized.t()).sub_(target).square_().sum(dtype=torch.float64))
        return total
