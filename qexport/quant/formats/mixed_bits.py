"""Groups of integers of different bits in one weight: what methods make of a format that gives all groups the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..strips import Levels
from .integer import IntegerCodes, IntegerFormat
from .midrise import Midrise, OddLevels

_LONGEST_GROUP = 128  # is one block of every kernel


@dataclass(frozen=True)
class MixedBits(IntegerFormat):
    """Signed codes without zero points, odd ones where a group has 2 bits or 1; no name asks for it.

    Attributes:
        bits: the most that a group has.
        group_bits: of each group of input features, for all output features alike.
    """

    group_bits: tuple[int, ...] = ()
    odd_up_to: ClassVar[int] = 2  # bits: with 3 there are enough for a zero in the middle

    @classmethod
    def of(cls, fmt: IntegerCodes, group_bits: Sequence[int]) -> "MixedBits":
        """A format, which `may_replace` allows, with other bits."""
        coarse = fmt.has_coarse_scales
        return cls(max(group_bits), fmt.group_size, coarse_scales=coarse, group_bits=tuple(group_bits))

    @staticmethod
    def may_replace(fmt: object, features: int) -> bool:
        """Whether groups of a format can have bits of their own: signed codes, a block of a kernel each."""
        if not isinstance(fmt, IntegerFormat | Midrise) or not fmt.symmetric or not fmt.scales_in_sum:
            return False
        return 0 < fmt.group_size <= _LONGEST_GROUP and features % fmt.group_size == 0

    @property
    def stored_bits(self) -> int:
        return 4 if self.bits <= 4 else 8

    @property
    def in_planes(self) -> bool:
        return True

    def levels(self) -> list[Levels]:
        return [OddLevels(bits) if bits <= self.odd_up_to else IntegerLevels(bits) for bits in self.group_bits]

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        return self._scales(w, None, clip=False), None

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, None]:
        return self._scales(w, importance, clip=True), None

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        for fmt, groups, columns in self._parts(w.device):
            codes[:, columns] = fmt.encode(w[:, columns], scale[:, groups], None)
        return codes

    def _scales(self, w: Tensor, importance: Tensor | None, clip: bool) -> Tensor:
        found = torch.empty(len(w), len(self.group_bits), dtype=torch.float32, device=w.device)
        for fmt, groups, columns in self._parts(w.device):
            part, counts = w[:, columns], None if importance is None else importance[columns]
            found[:, groups] = (fmt.clipped_scales(part, counts) if clip else fmt.scales(part))[0]
        return self.kept_scale(found)

    def _bytes_of_blocks(self, shape: tuple[int, int], scale_bytes: int) -> int:
        codes = self.group_size * sum(self.group_bits) // 8
        return shape[0] * (codes + self._bytes_of_scales(len(self.group_bits), scale_bytes))

    def _parts(self, device: torch.device) -> Iterator[tuple[IntegerCodes, Tensor, Tensor]]:
        """For each number of bits the format of such groups, their numbers and their input features."""
        bits = torch.tensor(self.group_bits, device=device)
        for few in sorted(set(self.group_bits)):
            groups = (bits == few).nonzero().squeeze(1)
            columns = groups[:, None] * self.group_size + torch.arange(self.group_size, device=device)
            kind = Midrise if few <= self.odd_up_to else IntegerFormat
            yield kind(few, self.group_size, coarse_scales=self.coarse_scales), groups, columns.reshape(-1)


@dataclass(frozen=True)
class IntegerLevels:
    """All integers; attributes: bits of a signed code."""

    bits: int

    def nearest(self, steps: Tensor) -> Tensor:
        """The nearest ones, int8."""
        half = 1 << self.bits - 1
        return steps.round().clamp_(-half, half - 1).to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """float32 values of codes."""
        return codes.float()
