"""Ranges of activations from streams of batches, in memory that does not grow with the stream."""

import math
from typing import Protocol

import torch
from torch import Tensor

from .. import ranks
from ..errors import NumericsError, RecipeError
from .formats import ActivationFormat

# A bin of the magnitude histogram is one value of the leading bits of a float32: sign, 8 exponent, 10 mantissa bits.
_DROPPED_BITS = 13
_BINS = 0x7F800000 >> _DROPPED_BITS
_CHUNK = 1 << 20
_GOLDEN = 2654435761  # 2^32 over the golden ratio: neighbours end up far from each other


class Statistic(Protocol):
    """What is gathered of a stream of values."""

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]."""

    def across(self) -> None:
        """Take in what the statistics of this value in other processes have seen, see `ranks.combine`."""


class AbsmaxObserver:
    """The largest magnitude seen."""

    def __init__(self) -> None:
        self._absmax: float | None = None

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape; raises NumericsError on NaN or Inf."""
        if x.numel():
            seen = max(float(x.amax()), -float(x.amin()))
            if not math.isfinite(seen):
                raise _not_finite()
            self._absmax = seen if self._absmax is None else max(seen, self._absmax)

    def across(self) -> None:
        """See `Statistic`."""
        seen = [value for value in ranks.gather(self._absmax) if value is not None]
        self._absmax = max(seen, default=None)

    def absmax(self) -> float:
        """Raises NumericsError when nothing was seen."""
        if self._absmax is None:
            raise _no_data()
        return self._absmax


class MagnitudeHistogram:
    """Counts of |x| in bins of constant relative width, 2^-10 of the power of two below.

    Bins come from the bits of the float32 value, so there is no range to guess or to double: the counts do not depend
    on how the data was split or ordered, and a maximum a thousand times the bulk costs the bulk no resolution.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._absmax = AbsmaxObserver()

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape; raises NumericsError on NaN or Inf."""
        self._absmax.update(x)
        for piece in x.detach().reshape(-1).split(_CHUNK):
            bits = piece.float().abs().view(torch.int32).bitwise_right_shift_(_DROPPED_BITS)
            self._counts += torch.bincount(bits, minlength=_BINS).to(self._counts.device)

    def across(self) -> None:
        """See `Statistic`."""
        ranks.total(self._counts)
        self._absmax.across()

    def absmax(self) -> float:
        """The largest magnitude seen; raises NumericsError when nothing was seen."""
        return self._absmax.absmax()

    def bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower edges, upper edges and counts of the bins that are not empty, float64, in rising order."""
        index = self._counts.nonzero().squeeze(1)
        edges = torch.stack((index, index + 1)).to(torch.int32).bitwise_left_shift_(_DROPPED_BITS).view(torch.float32)
        lower, upper = edges.double().clamp_max_(self.absmax())
        return lower, upper, self._counts[index].double()


class PercentileObserver:
    """The magnitude that `percentile` per cent of the elements do not exceed; at most 2^-10 relative too large."""

    def __init__(self, percentile: float = 99.99):
        if not 0 < percentile <= 100:
            raise RecipeError(
                f"a percentile of {percentile} is out of range", remedy="Use a number above 0 and up to 100"
            )
        self._percentile, self._histogram = percentile, MagnitudeHistogram()

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape; raises NumericsError on NaN or Inf."""
        self._histogram.update(x)

    def across(self) -> None:
        """See `Statistic`."""
        self._histogram.across()

    def absmax(self) -> float:
        """Raises NumericsError when nothing was seen."""
        _, upper, counts = self._histogram.bins()
        below = counts.cumsum(0)
        rank = math.ceil(self._percentile / 100 * float(below[-1]))
        return float(upper[int(torch.searchsorted(below, rank))])


class MseObserver:
    """The clipping magnitude with the least mean squared quantization error for a symmetric grid of `fmt.bits`.

    Candidates are the maximum divided by 2^(i/32), down to 1/256 of it.
    """

    def __init__(self, fmt: ActivationFormat):
        self._format, self._histogram = fmt, MagnitudeHistogram()

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape; raises NumericsError on NaN or Inf."""
        self._histogram.update(x)

    def across(self) -> None:
        """See `Statistic`."""
        self._histogram.across()

    def absmax(self) -> float:
        """Raises NumericsError when nothing was seen."""
        lower, upper, counts = self._histogram.bins()
        values, largest = (lower + upper) / 2, self._histogram.absmax()
        if largest == 0:
            return 0.0
        candidates = [largest * 2 ** (-i / 32) for i in range(257)]
        errors = []
        for clip in candidates:
            step = clip / self._format.qmax
            rounded = self._format.round_steps(values / step).mul_(step)
            errors.append(float(torch.dot(counts, rounded.sub_(values).square_())))
        return candidates[errors.index(min(errors))]


class ChannelAbsmax:
    """The largest magnitude seen of every feature."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]; raises NumericsError on NaN or Inf."""
        if x.shape[0]:
            seen = torch.maximum(x.amax(0), -x.amin(0)).float()
            if not bool(torch.isfinite(seen).all()):
                raise _not_finite()
            self._absmax = seen if self._absmax is None else torch.maximum(self._absmax, seen)

    def across(self) -> None:
        """See `Statistic`."""
        seen = [value for value in ranks.gather(self._absmax) if value is not None]
        self._absmax = torch.stack(seen).amax(0) if seen else None

    def absmax(self) -> Tensor:
        """float32 [K]; raises NumericsError when nothing was seen."""
        if self._absmax is None:
            raise _no_data()
        return self._absmax

    def unseen(self) -> Tensor:
        """Whether a feature was zero for every token, bool [K]; raises as `absmax`."""
        return self.absmax() == 0


class ChannelMeanAbs:
    """The mean magnitude of every feature over all tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]; raises NumericsError on NaN or Inf."""
        if x.shape[0]:
            seen = x.abs().sum(0, dtype=torch.float64)
            if not bool(torch.isfinite(seen).all()):
                raise _not_finite()
            self._sum = seen if self._sum is None else self._sum + seen
            self._tokens += x.shape[0]

    def across(self) -> None:
        """See `Statistic`."""
        seen = [(value, tokens) for value, tokens in ranks.gather((self._sum, self._tokens)) if value is not None]
        if seen:
            self._sum, self._tokens = torch.stack([value for value, _ in seen]).sum(0), sum(n for _, n in seen)

    def mean(self) -> Tensor:
        """float32 [K]; raises NumericsError when nothing was seen."""
        if self._sum is None:
            raise _no_data()
        return (self._sum / self._tokens).float()

    def unseen(self) -> Tensor:
        """Whether a feature was zero for every token, bool [K]; raises as `mean`."""
        return self.mean() == 0


class RowSample:
    """At most `limit` tokens of a stream, each as likely as any other, always the same ones for the same stream.

    A token's number is scrambled, and those with the smallest results stay. Every k-th token instead would meet the
    first one of every sequence, whose activations are often unlike all others.
    """

    def __init__(self, limit: int = 512) -> None:
        self._limit, self._seen = limit, 0
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._rows: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]."""
        numbers = torch.arange(self._seen, self._seen + x.shape[0])
        self._seen += x.shape[0]
        keys = torch.cat([self._keys, (numbers * _GOLDEN) & 0xFFFFFFFF])
        chosen = keys.argsort()[: self._limit].sort().values  # in the order of the stream
        known = len(self._keys)
        old, new = chosen[chosen < known], chosen[chosen >= known] - known
        self._rows = x[new].clone() if self._rows is None else torch.cat([self._rows[old], x[new]])
        self._keys = keys[chosen]

    def across(self) -> None:
        """See `Statistic`."""
        seen = [(keys, rows) for keys, rows in ranks.gather((self._keys, self._rows)) if rows is not None]
        if seen:
            keys = torch.cat([keys for keys, _ in seen])
            chosen = keys.argsort(stable=True)[: self._limit].sort().values
            self._keys, self._rows = keys[chosen], torch.cat([rows for _, rows in seen])[chosen]

    def rows(self) -> Tensor:
        """float [tokens, K]; raises NumericsError when nothing was seen."""
        if self._rows is None or not len(self._rows):
            raise _no_data()
        return self._rows


class CompositeObserver:
    """Several statistics of one stream.

    Attributes:
        parts: the statistics.
    """

    def __init__(self, first: "ChannelAbsmax | ChannelMeanAbs", *others: Statistic) -> None:
        self._first, self.parts = first, (first, *others)

    def update(self, x: Tensor) -> None:
        """Show x to every part."""
        for part in self.parts:
            part.update(x)

    def across(self) -> None:
        """See `Statistic`."""
        ranks.combine(self.parts)

    def unseen(self) -> Tensor:
        """What the first part says; see `ChannelAbsmax.unseen`."""
        return self._first.unseen()


def _not_finite() -> NumericsError:
    return NumericsError("an activation has NaN or Inf", remedy="Check the calibration data and the model")


def _no_data() -> NumericsError:
    return NumericsError("no activation was observed", remedy="Use more calibration data")
