"""How keys and values are kept, as a choice beside the schemes of weights: what each way takes and costs.

A budget that counts the cache of a text has bytes to give to both. All layers keep theirs the same way, so the choices
are few, and weights are chosen for with what each of them leaves of the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.cache_names import is_past, is_state
from ..capture.graph import CapturedModel
from ..recipe.methods import CacheMethod
from ..recipe.recipe import Recipe
from ..targets.base import Target


@dataclass(frozen=True)
class CacheChoice:
    """One way to keep keys and values.

    Attributes:
        method: the section of a recipe that asks for it; None for floats.
        numbers: what the cache holds, such as "int8"; empty where no cache is counted.
        bytes: of the keys and values of one text of the length that was asked about.
        kl: what it adds, in nats a token.
    """

    method: CacheMethod | None
    numbers: str
    bytes: int
    kl: float


UNCOUNTED = CacheChoice(None, "", 0, 0.0)


@dataclass(frozen=True)
class CountedCache:
    """The cache of a text, which a budget counts.

    Attributes:
        tokens: of the text.
        methods: how it can be kept, besides in floats; the recipe's own alone where it has one.
        floats: whether it can stay in floats.
        float_bits: of a number that stays float; e4m3: whether the target keeps E4M3 numbers.
    """

    tokens: int
    methods: Sequence[CacheMethod]
    floats: bool
    float_bits: int
    e4m3: bool

    def choices(self, captured: CapturedModel, kl: Sequence[float]) -> tuple[CacheChoice, ...]:
        """What there is to choose from, floats first.

        Args:
            kl: what each of the methods adds.
        """
        count = self.tokens * numbers_a_token(captured)
        floats = CacheChoice(None, f"{self.float_bits}-bit floats", count * self.float_bits // 8, 0.0)
        coded = (
            CacheChoice(m, m.called_numbers, count * m.bits_kept(self.float_bits, self.e4m3) // 8, cost)
            for m, cost in zip(self.methods, kl, strict=True)
        )
        return (floats, *coded) if self.floats else tuple(coded)


def cache_of(captured: CapturedModel, recipe: Recipe, target: Target) -> CacheChoice | None:
    """What one token takes in the cache of a decoder that is exported by a recipe; None where nothing is kept."""
    own = [method for method in recipe.methods if isinstance(method, CacheMethod)]
    counted = CountedCache(1, own, not own, 8 * target.dtype.itemsize, target.e4m3_cache)
    return counted.choices(captured, [0.0] * len(own))[0] if numbers_a_token(captured) else None


def numbers_a_token(captured: CapturedModel) -> int:
    """How many numbers a decoder keeps for every token; states of a fixed size are none of them."""
    ports = (port for port in captured.inputs if is_past(port.name) and not is_state(port.name))
    return sum(math.prod(dim for dim in port.dims if isinstance(dim, int)) for port in ports)
