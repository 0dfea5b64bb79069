"""Groups of integers of different bits in one weight: what methods make of a format that gives all groups the same."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import encode, grouped
from .integer import IntegerFormat
from .stepped import nonzero


_LONGEST_GROUP = 128  # is one block of every kernel


@dataclass(frozen=True)
class MixedBits(IntegerFormat):
    """Signed codes without zero points; no name asks for it. Of one bit, codes are -1 and 1.

    Attributes:
        bits: the most that a group has, from which follows what kernels read.
        group_bits: of each group of input features, for all output features alike.
    """

    group_bits: tuple[int, ...] = ()

    @staticmethod
    def may_replace(fmt: IntegerFormat, features: int) -> bool:
        """Whether groups of a format can have bits of their own: signed codes of 2 to 6, a block of a kernel each."""
        blocks = 0 < fmt.group_size <= _LONGEST_GROUP and features % fmt.group_size == 0
        return blocks and fmt.symmetric and fmt.scales_in_sum and 2 <= fmt.bits <= 6

    @property
    def in_planes(self) -> bool:
        return True

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        """That of the nearest codes; of one bit, the mean magnitude."""
        return self._scales(w, None, clip=False), None

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, None]:
        return self._scales(w, importance, clip=True), None

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        for fmt, groups, columns in self._parts(w.device):
            if fmt.bits == 1:
                codes[:, columns] = torch.where(w[:, columns] < 0, -1, 1).to(torch.int8)
            else:
                codes[:, columns] = encode(w[:, columns], scale[:, groups], None, fmt)
        return codes

    def levels(self) -> "list[GroupLevels]":
        """The values of each group in steps."""
        return [GroupLevels(bits) for bits in self.group_bits]

    def _scales(self, w: Tensor, importance: Tensor | None, clip: bool) -> Tensor:
        found = torch.empty(len(w), len(self.group_bits), dtype=torch.float32, device=w.device)
        for fmt, groups, columns in self._parts(w.device):
            part = w[:, columns]
            counts = None if importance is None else importance[columns]
            if fmt.bits == 1:
                found[:, groups] = _mean_magnitudes(part, counts, fmt)
            else:
                found[:, groups] = (fmt.clipped_scales(part, counts) if clip else fmt.scales(part))[0]
        return self.kept_scale(found)

    def _bytes_of_blocks(self, shape: tuple[int, int], scale_bytes: int) -> int:
        n, k = shape
        codes = self.group_size * sum(self.group_bits) // 8
        return n * (codes + self._bytes_of_scales(self.groups(k), scale_bytes))

    def _parts(self, device: torch.device) -> Iterator[tuple[IntegerFormat, Tensor, Tensor]]:
        """For each number of bits the format of such groups, their numbers and their input features."""
        bits = torch.tensor(self.group_bits, device=device)
        for part in sorted(set(self.group_bits)):
            groups = (bits == part).nonzero().squeeze(1)
            columns = groups[:, None] * self.group_size + torch.arange(self.group_size, device=device)
            yield IntegerFormat(part, self.group_size, coarse_scales=self.coarse_scales), groups, columns.reshape(-1)


@dataclass(frozen=True)
class GroupLevels:
    """The values of a group of signed codes, in steps; attributes: bits of a code."""

    bits: int

    def nearest(self, steps: Tensor) -> Tensor:
        """Codes int8 of the nearest values."""
        if self.bits == 1:
            return torch.where(steps < 0, -1, 1).to(torch.int8)
        half = 1 << self.bits - 1
        return steps.round().clamp_(-half, half - 1).to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """float32 values of codes."""
        return codes.float()


def _mean_magnitudes(w: Tensor, importance: Tensor | None, fmt: IntegerFormat) -> Tensor:
    """The scales of signs with the least squared error, [N, G]; importance: [K], of the error of a feature."""
    sizes = grouped(w.float().abs(), fmt)
    if importance is None:
        return nonzero(sizes.mean(-1))
    counts = grouped(importance.float()[None], fmt)
    total = counts.sum(-1)
    weighed = (sizes * counts).sum(-1) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return nonzero(torch.where(total > 0, weighed, sizes.mean(-1)))
