"""The quantization kernel (CrossQuant, arXiv 2410.07505): the share of activations that rounding makes zero."""

from typing import Any

import torch
from torch import Tensor

from .. import ranks
from .formats import ActivationFormat
from .observers import ChannelAbsmax, MagnitudeHistogram


def token_range(x: Tensor, factors: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """What the largest code of every token stands for, [..., 1].

    Args:
        x: float [..., K].
        factors, alpha: CrossQuant's row scale (max |x * factors|)^alpha, widened to max |x| where a channel exceeds the
            range that it was calibrated with; None: the largest magnitude.
    """
    absmax = x.abs().amax(-1, keepdim=True)
    if factors is None:
        return absmax
    return torch.maximum((x * factors).abs().amax(-1, keepdim=True).pow(alpha), absmax)


def token_step(x: Tensor, fmt: ActivationFormat, factors: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """The step between codes of every token, float32 [tokens, 1].

    Args:
        x: float [tokens, K].
        factors, alpha: as `token_range`.
    """
    return token_range(x, factors, alpha) / fmt.qmax


def cross_step(x: Tensor, fmt: ActivationFormat, alpha: float) -> Tensor:
    """CrossQuant's step for every element as it was published: t^alpha c^(1-alpha) / qmax, float32 [tokens, K]."""
    size = x.abs()
    return size.amax(-1, keepdim=True).pow(alpha) * size.amax(0).pow(1 - alpha) / fmt.qmax


class TokenKernel:
    """Counts activations below half a step of a dynamic format.

    Args:
        fmt, factors, alpha: as `token_step`.
        crossed: the step is t^alpha c^(1-alpha) / qmax, c over the tokens of one `update`.
    """

    def __init__(
        self, fmt: ActivationFormat, factors: Tensor | None = None, alpha: float = 1.0, crossed: bool = False
    ) -> None:
        self._fmt, self._factors, self._alpha, self._crossed = fmt, factors, alpha, crossed
        self._small = self._zero = self._all = 0

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]."""
        if self._crossed:
            half = cross_step(x, self._fmt, self._alpha) / 2
        else:
            half = token_step(x, self._fmt, self._factors, self._alpha) / 2
        size = x.abs()
        self._zero += int((size == 0).sum())
        self._small += int(((size < half) | (size == 0)).sum())
        self._all += x.numel()

    def across(self) -> None:
        """See `Statistic`."""
        counts = ranks.gather((self._small, self._zero, self._all))
        self._small, self._zero, self._all = (sum(column) for column in zip(*counts, strict=True))

    def kernel(self) -> dict[str, float]:
        """The share with and without exact zeros, which ReLU makes and which cost nothing."""
        return _shares(self._small, self._zero, self._all)


class RangeAndKernel:
    """A static range and, for the scale made of it, the share of activations below half a step.

    Args:
        chooses: another observer to choose the range; None takes the largest magnitude.
    """

    def __init__(self, chooses: Any = None) -> None:
        self._histogram, self._channels, self._chooses = MagnitudeHistogram(), ChannelAbsmax(), chooses

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]; raises NumericsError on NaN or Inf."""
        self._histogram.update(x)
        self._channels.update(x)
        if self._chooses is not None:
            self._chooses.update(x)

    def across(self) -> None:
        """See `Statistic`."""
        ranks.combine([self._histogram, self._channels, *([] if self._chooses is None else [self._chooses])])

    def absmax(self) -> float:
        """Raises NumericsError when nothing was seen."""
        return (self._chooses or self._histogram).absmax()

    def unseen(self) -> Tensor:
        """Whether a feature was zero for every token, bool [K]."""
        return self._channels.unseen()

    def kernel(self, scale: float) -> dict[str, float]:
        """The shares for a scale; the histogram's bins make them exact to 2^-10 of the half step."""
        lower, _, counts = self._histogram.bins()
        zero = float(counts[lower == 0].sum())
        return _shares(float(counts[lower < scale / 2].sum()), zero, float(counts.sum()))


def _shares(small: float, zero: float, total: float) -> dict[str, float]:
    nonzero = total - zero
    return {
        "kernel": round(small / total, 6) if total else 0.0,
        "kernel_without_zeros": round((small - zero) / nonzero, 6) if nonzero else 0.0,
    }
