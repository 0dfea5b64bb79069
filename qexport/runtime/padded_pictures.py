"""Pictures of different sizes that are padded to one: how many rows of features are theirs, and some of chance.

Which of these a model has is a setting of its manifest, by which it is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_SIDE = 16  # rows of features along each side of a picture that is measured


class Padded(Protocol):
    """How a model's pictures are padded."""

    def rows(self, pictures: Mapping[str, np.ndarray]) -> int:
        """Rows of features that pictures make, without those of padding."""

    def example(self, name: str, dims: Sequence[int | str], count: int, random: np.random.Generator) -> np.ndarray:
        """An input for so many pictures without padding; dims: its dimensions, free ones by name."""


@dataclass(frozen=True)
class BySizes:
    """Pictures with their heights and widths beside them.

    Attributes:
        name: of the input [pictures, 2] that says them, in pixels.
        side: pixels of a row of features along each side.
    """

    name: str
    side: int

    def rows(self, pictures: Mapping[str, np.ndarray]) -> int:
        """See `Padded`."""
        return int((pictures[self.name] // self.side).prod(1).sum())

    def example(self, name: str, dims: Sequence[int | str], count: int, random: np.random.Generator) -> np.ndarray:
        """See `Padded`."""
        pixels = _SIDE * self.side
        if name == self.name:
            return np.full((count, 2), pixels, np.int64)
        sizes = [dim if isinstance(dim, int) else pixels for dim in dims[1:]]
        return random.standard_normal((count, *sizes)).astype(np.float32)


@dataclass(frozen=True)
class ByPlaces:
    """Patches with their places beside them.

    Attributes:
        name: of the input [pictures, patches, 2] that says them, column and row; -1 is padding.
        merged: patches of a row of features along each side.
    """

    name: str
    merged: int

    def rows(self, pictures: Mapping[str, np.ndarray]) -> int:
        """See `Padded`."""
        patches = (pictures[self.name] >= 0).all(-1).sum(1)
        return int((patches // self.merged**2).sum())

    def example(self, name: str, dims: Sequence[int | str], count: int, random: np.random.Generator) -> np.ndarray:
        """See `Padded`."""
        side = _SIDE * self.merged
        if name == self.name:
            row, column = np.divmod(np.arange(side * side), side)
            return np.broadcast_to(np.stack([column, row], axis=-1), (count, side * side, 2)).astype(np.int64)
        return random.standard_normal((count, side * side, *map(int, dims[2:]))).astype(np.float32)


@dataclass(frozen=True)
class ByShapes:
    """Patches, row by row, with the numbers of them in height and width beside them.

    Attributes:
        name: of the input [pictures, 2] that says them.
        merged: patches of a row of features along each side.
    """

    name: str
    merged: int

    def rows(self, pictures: Mapping[str, np.ndarray]) -> int:
        """See `Padded`."""
        return int((pictures[self.name] // self.merged).prod(1).sum())

    def example(self, name: str, dims: Sequence[int | str], count: int, random: np.random.Generator) -> np.ndarray:
        """See `Padded`."""
        side = _SIDE * self.merged
        if name == self.name:
            return np.full((count, 2), side, np.int64)
        sizes = (count, side * side, *map(int, dims[2:]))
        return random.standard_normal(sizes).astype(np.float32) if len(sizes) > 2 else np.ones(sizes, np.int64)


def padded_of(about: Mapping[str, Any]) -> Padded | None:
    """How the pictures of an export are padded, by the manifest of all parts; None where they are not."""
    if "sizes" in about:
        return BySizes(about["sizes"], about["pixels_of_a_row"])
    if "shapes" in about:
        return ByShapes(about["shapes"], about["patches_of_a_row"])
    return ByPlaces(about["places"], about["patches_of_a_row"]) if "places" in about else None
