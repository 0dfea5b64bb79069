"""Which scheme each linear gets: the least KL for a number of bytes, or the fewest bytes for a KL.

What linears add to KL is as good as independent, so a choice for one does not change what the others gain. Going from
the smallest choice of everything upward, the step that gains the most for a byte comes first; of each item only the
choices on the lower convex hull of (bytes, KL) are steps. That is the best there is for every budget that such a walk
meets, and within one step of it between them (Everett, Generalized Lagrange multipliers, 1963).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .caches import UNCOUNTED, CacheChoice


@dataclass(frozen=True)
class SchemeChoice:
    """A scheme for an item: its name, the bytes it takes and the KL it adds, in nats a token."""

    scheme: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Allocation:
    """One choice for every item, in order, and their sums; and how the cache is kept, where that is counted."""

    choices: tuple[SchemeChoice, ...]
    cache: CacheChoice = UNCOUNTED

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(choice.scheme for choice in self.choices)

    @property
    def picked(self) -> tuple[str, ...]:
        """What tells it from other allocations of the same items."""
        return (*self.schemes, self.cache.numbers)

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    @property
    def kl(self) -> float:
        return sum(choice.kl for choice in self.choices)


def within_bytes(items: Sequence[Sequence[SchemeChoice]], most: int) -> Allocation | None:
    """The least KL in at most so many bytes; None where the smallest choices take more."""
    ladders = [_hull(choices) for choices in items]
    at, used = [0] * len(ladders), sum(ladder[0].bytes for ladder in ladders)
    if used > most:
        return None
    full: set[int] = set()  # items whose next step does not fit: the ones behind it gain less for a byte
    for item, step in _steps(ladders):
        more = ladders[item][step].bytes - ladders[item][step - 1].bytes
        if item in full or used + more > most:
            full.add(item)
            continue
        at[item], used = step, used + more
    return _allocation(ladders, at)


def within_kl(items: Sequence[Sequence[SchemeChoice]], most: float) -> Allocation | None:
    """The fewest bytes that add at most so much KL; None where the best choices add more."""
    ladders = [_hull(choices) for choices in items]
    at, kl = [0] * len(ladders), sum(ladder[0].kl for ladder in ladders)
    for item, step in _steps(ladders):
        if kl <= most:
            break
        at[item], kl = step, kl + ladders[item][step].kl - ladders[item][step - 1].kl
    return _allocation(ladders, at) if kl <= most else None


def _hull(choices: Sequence[SchemeChoice]) -> list[SchemeChoice]:
    """The choices worth taking, smallest first: each step gains less for a byte than the one before."""
    hull: list[SchemeChoice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.kl)):
        if hull and choice.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(before: SchemeChoice, after: SchemeChoice) -> float:
    return (before.kl - after.kl) / (after.bytes - before.bytes)


def _steps(ladders: Sequence[Sequence[SchemeChoice]]) -> list[tuple[int, int]]:
    """(item, step) of every step, the one that gains the most for a byte first; steps of an item stay in order."""
    gains = [
        (_gain(before, after), item, step)
        for item, ladder in enumerate(ladders)
        for step, (before, after) in enumerate(pairwise(ladder), 1)
    ]
    return [(item, step) for _, item, step in sorted(gains, key=lambda g: (-g[0], g[1], g[2]))]


def _allocation(ladders: Sequence[Sequence[SchemeChoice]], at: Sequence[int]) -> Allocation:
    return Allocation(tuple(ladder[step] for ladder, step in zip(ladders, at, strict=True)))
