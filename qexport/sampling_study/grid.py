"""What a study varies: prompts, sampling settings and lengths."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..runtime.sampling import Sampling

# Short, and each of another kind, as what comes next should not hang on one topic.
PROMPTS = (
    "The moon has phases because",
    "To bake bread at home, begin with",
    "The old lighthouse keeper opened the door and",
    "A list of useful habits:\n1.",
    "The first railway in the country was built",
    "def mean(numbers):",
)


@dataclass(frozen=True)
class Draw:
    """One way to draw a text: settings and a seed; temperature 0 takes the likeliest token."""

    temperature: float
    top_k: int
    seed: int

    @property
    def sampling(self) -> Sampling | None:
        return Sampling(self.temperature, self.top_k, seed=self.seed) if self.temperature else None


@dataclass(frozen=True)
class Grid:
    """All values of every setting; each is taken with each.

    Attributes:
        temperatures: 0 takes the likeliest token.
        top_ks: how many of the likeliest tokens to draw from; 0 draws from all.
        max_new_tokens: lengths; the longest is generated, and the others are how it begins.
        seeds: of the random numbers.

    Raises:
        InputError: nothing given, or a value out of range.
    """

    temperatures: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)
    top_ks: tuple[int, ...] = (0, 50)
    max_new_tokens: tuple[int, ...] = (32, 128)
    seeds: tuple[int, ...] = (0, 1)

    def __post_init__(self):
        for name, least in (("temperatures", 0), ("top_ks", 0), ("max_new_tokens", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not values:
                raise InputError("nothing to try", place=name, remedy="Give at least one value")
            for value in values:
                if not (math.isfinite(value) and value >= least):
                    raise InputError(f"{value} is out of range", place=name, remedy=f"Give {least} or more")
            object.__setattr__(self, name, tuple(sorted(set(values))))

    @property
    def longest(self) -> int:
        return max(self.max_new_tokens)

    def draws(self) -> list[Draw]:
        """Every draw once. The likeliest token is the same for all top_k and seeds: top_k 0 and the first seed."""
        sampled = [t for t in self.temperatures if t]
        greedy = [Draw(0.0, 0, self.seeds[0])] if 0 in self.temperatures else []
        return greedy + [Draw(t, k, seed) for t in sampled for k in self.top_ks for seed in self.seeds]


def read_prompts(prompts: str | os.PathLike | Sequence[str] | None) -> tuple[str, ...]:
    """Prompts from a UTF-8 file, one a line, or as they are given; None takes those that come with qexport.

    Raises:
        InputError: the file cannot be read, or there is no prompt.
    """
    if prompts is None:
        return PROMPTS
    place = "prompts"
    if isinstance(prompts, (str, os.PathLike)):
        place = str(prompts)
        try:
            prompts = Path(prompts).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(
                f"cannot read the prompts: {error.strerror}", place=place, remedy="Give a file with a prompt a line"
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(f"byte {error.start} is not UTF-8", place=place, remedy="Convert the file") from None
    found = tuple(dict.fromkeys(text for text in prompts if text.strip()))
    if not found:
        raise InputError("no prompt in it", place=place, remedy="Give at least one")
    return found
