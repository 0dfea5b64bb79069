"""Schemes: what becomes of a linear's weight and of its input."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..grids import ActivationFormat
from .base import WeightFormat, parse, regrouped, weight_formats


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format (None: float), under the name a user writes."""

    name: str
    weight: WeightFormat
    activation: ActivationFormat | None

    @property
    def integer(self) -> bool:
        """Whether the product is one integer matmul: both sides integers, no scale inside the sum."""
        return self.activation is not None and not self.weight.scales_in_sum

    @property
    def table(self) -> bool:
        """Whether rows of such a weight can be looked up: integer codes in groups, and activations in float."""
        return self.activation is None and self.weight.rows_readable

    @property
    def interchangeable(self) -> bool:
        """Whether mixed precision may put one of its candidates in the place of this scheme."""
        return self.activation is None and self.weight.interchangeable

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Read a name, in any case, by the format that has such names (see `formats.integer` and `formats.codebooks`).

        Raises:
            RecipeError: unknown name, or a combination that no target runs.
        """
        return cls(name.lower(), *parse(name.lower()))

    def fit(self, in_features: int, whole: bool = False) -> tuple["Scheme | None", str]:
        """The scheme that a weight of this width can take, None for none, and why it is not this one.

        Args:
            whole: the last group may not be shorter than the others.
        """
        weight, why = self.weight.fit(in_features, whole)
        if weight is None or weight == self.weight:
            return (self if weight is not None else None), why
        return replace(self, name=regrouped(self.name, weight.group_size), weight=weight), why

    def bytes(self, shape: tuple[int, int], float_bytes: int) -> int:
        """Bytes of a weight (N, K) in the file.

        Args:
            float_bytes: of a number that stays float; the scales of integer products are float32 whatever it is.
        """
        return self.weight.bytes(shape, 4 if self.integer else float_bytes)


def full_name(name: str) -> str:
    """The lower-case name of a scheme, `W4A16` -> `w4a16_g128`, `w8a8` -> `w8a8_dyn`.

    Raises:
        RecipeError: no such scheme.
    """
    short = {short: full for cls in weight_formats() for short, full in cls.short.items()}
    return Scheme.parse(short.get(name.lower(), name)).name


def offered(named: Iterable[str]) -> list[Scheme]:
    """What mixed precision chooses from: the schemes that are named, and those that formats name, each once."""
    every = (*named, *(own for cls in weight_formats() for own in cls.candidates))
    return [Scheme.parse(name) for name in dict.fromkeys(every)]
