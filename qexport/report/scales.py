"""Axes and colour scales: where ticks go, which step of a scale a value takes, how numbers are written."""

import math
from collections.abc import Sequence
from statistics import fmean

STEPS = 9
"""Steps of the colour scale of heat maps."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` and at least one."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)), 10 * power)
    first = math.ceil(low / width - 1e-9)
    found = [(first + i) * width for i in range(int(math.floor(high / width + 1e-9)) - first + 1)]
    return [0.0 if abs(t) < width * 1e-9 else t for t in found] or [low]


def whole_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """The same among whole numbers, for layers and tokens."""
    return sorted({float(round(t)) for t in ticks(low, high, most) if low <= round(t) <= high}) or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, with 2 and 5 times them where there are few; both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high <= 100 * low else (1,)
    stride = max(1, (last - first) // 5)
    found = [f * 10.0**p for p in range(first, last + 1, stride) for f in factors]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)] or [low]


def widened(values: Sequence[float], *, from_zero: bool = False, log: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows all of `values` (not empty) and a little more."""
    low, high = min(values), max(values)
    if log:
        return low / 1.25, high * 1.25
    if from_zero:
        low = min(low, 0.0)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved by as little as keeps them `gap` apart (closer where there is no room), from `low` to `high`.

    Their order stays. What is too close forms a group around its middle, and groups that meet become one.
    """
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    # Less the gaps in front of it, each place only has to be no lower than the one before.
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([places[i] - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    level = [fmean(group) for group in groups for _ in group]
    found, most = [0.0] * len(places), high - (len(places) - 1) * gap
    for rank, i in enumerate(order):
        found[i] = min(max(level[rank], low), most) + rank * gap
    return found


def step(badness: float) -> int:
    """The step of the colour scale for a share from 0 to 1."""
    return min(max(int(badness * STEPS), 0), STEPS - 1)


def short(value: float) -> str:
    """A number as tick label: `0.002`, `15`, `2e-05`, `1e+06`."""
    return f"{value:.4g}"


def small(value: float | None, digits: int = 3) -> str:
    """A number with a few digits, empty for None."""
    return "" if value is None else f"{value:.{digits}g}"
