"""KL against bytes: what a model loses from its smallest schemes to its closest ones.

Sizes from the smallest choice of everything to the closest are spaced evenly, and for each the allocator chooses. A few
of the choices are exported and measured. What costs foretell of the others, which is of rounding to nearest, is
corrected by what was measured beside them: the ratio of both changes slowly along the curve, so that its logarithm is
taken as straight between two measured choices.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CurvePoint:
    """A file of some size.

    Attributes:
        bytes: of the model's files, and of the cache where that is counted; about so many where they were not written.
        kl: mean KL from the float model, in nats a token.
        measured: it was exported and measured; else both are estimates.
        schemes: how many linears, and tables of embeddings, have each scheme.
        recipe: the file with its recipe, in the folder of the export; empty where there is none.
    """

    bytes: int
    kl: float
    measured: bool
    schemes: Mapping[str, int]
    recipe: str = ""


@dataclass(frozen=True)
class Curve:
    """Points by size, the smallest first; text: what KL was measured on."""

    points: tuple[CurvePoint, ...]
    text: str

    def as_dict(self) -> dict[str, Any]:
        """The curve in plain types, as report.json keeps it under "curve"."""
        return {"text": self.text, "points": [asdict(point) for point in self.points]}


def sizes_between(least: int, most: int, count: int) -> list[int]:
    """`count` sizes, evenly spaced, both ends among them."""
    return [least + round((most - least) * i / (count - 1)) for i in range(count)]


def spread_over(count: int, few: int) -> set[int]:
    """The places of a few among `count` points, both ends among them, more of them where there are fewer bytes.

    KL falls fast there: from one point to the next that is measured, distances grow.
    """
    few = min(few, count)
    return {round((count - 1) * (i / (few - 1)) ** 1.3) for i in range(few)} if few > 1 else {0}


def estimated(foretold: float, known: Sequence[tuple[float, float]]) -> float:
    """The KL that a choice is expected to have.

    Args:
        foretold: by its costs, of rounding to nearest.
        known: (foretold, measured) of choices that were exported, at least one.
    """
    logs = sorted((math.log(max(cost, 1e-12)), math.log(max(kl, 1e-12) / max(cost, 1e-12))) for cost, kl in known)
    at, places = math.log(max(foretold, 1e-12)), [place for place, _ in logs]
    behind = bisect(places, at)
    if behind in (0, len(logs)):
        return foretold * math.exp(logs[min(behind, len(logs) - 1)][1])
    (x, low), (y, high) = logs[behind - 1], logs[behind]
    return foretold * math.exp(low + (high - low) * (at - x) / (y - x))


def knee(points: Sequence[tuple[int, float]]) -> int:
    """The place among (bytes, KL) behind which bytes gain little: farthest below the line from first to last.

    (Satopää and others, Finding a "Kneedle" in a Haystack, 2011.)
    """
    (x_low, y_high), (x_high, y_low) = min(points), max(points)
    wide, high = max(x_high - x_low, 1), (y_high - y_low) or 1.0
    below = [1 - (x - x_low) / wide - (y - y_low) / high for x, y in points]
    return below.index(max(below))
