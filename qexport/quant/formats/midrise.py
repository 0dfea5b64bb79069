"""Weights of one to three bits without a zero: odd numbers times a scale, as many above zero as below it.

Few codes with a zero in the middle leave one side a level short. ParetoQ (arXiv 2502.02631) takes grids like these for
2 bits and a sign for one. The file has them in so many bits; kernels read the odd numbers, in 4.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import NumericsError
from ..affine import FINITE_REMEDY, grouped, row_slices
from ..grids import ActivationFormat
from .base import group_size, weight_format
from .integer import IntegerCodes
from .stepped import nonzero

# Of the range of a group; of one bit the mean magnitude is sought, of normal weights a third of the largest.
_RATIOS = tuple(1 - i / 32 for i in range(25))


@dataclass(frozen=True)
class OddLevels:
    """Odd numbers; attributes: bits of a code."""

    bits: int

    def nearest(self, steps: Tensor) -> Tensor:
        """The nearest ones, int8; of numbers in the middle between two, half of them up."""
        most = (1 << self.bits) - 1
        return steps.add(1).div_(2).round_().mul_(2).sub_(1).clamp_(-most, most).to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """float32 values of codes."""
        return codes.float()


@weight_format
@dataclass(frozen=True)
class Midrise(IntegerCodes):
    """`w{1|2|3}a16_g{16..1024}_mid[_s8]`: odd numbers times a scale.

    Attributes:
        coarse_scales: as `IntegerFormat` has them.
    """

    coarse_scales: bool = False
    odd_up_to: ClassVar[int] = 3  # bits
    stem = r"w(?P<bits>[123])a16"
    options = r"_g(?P<group>\d+)_mid(?P<scales>_s8)?"
    examples = ("w2a16_g32_mid", "w2a16_g16_mid_s8")

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["Midrise", ActivationFormat | None]:
        size = group_size(match, match["group"])
        return cls(int(match["bits"]), size, coarse_scales=match["scales"] is not None), None

    @property
    def stored_bits(self) -> int:
        return 4

    @property
    def in_planes(self) -> bool:
        return True

    @property
    def has_coarse_scales(self) -> bool:
        return self.coarse_scales

    @property
    def qmin(self) -> int:
        return -self.qmax

    @property
    def qmax(self) -> int:
        return (1 << self.bits) - 1

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        """The largest code's is the largest magnitude of a group."""
        low, high = torch.aminmax(grouped(w, self).float(), dim=-1)
        scale = torch.maximum(high, -low) / self.qmax
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("the weight has NaN or Inf, or a range beyond float32", remedy=FINITE_REMEDY)
        return self.kept_scale(nonzero(scale)), None

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, None]:
        whole = self.scales(w)[0]
        return self.best_scales(w, [self.kept_scale(whole * ratio) for ratio in _RATIOS], importance), None

    def levels(self) -> OddLevels:
        return OddLevels(self.bits)

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes, levels = torch.empty(w.shape, dtype=torch.int8, device=w.device), self.levels()
        for rows in row_slices(*w.shape):
            steps = grouped(w[rows].float(), self) / scale[rows, :, None]
            codes[rows] = levels.nearest(steps).reshape(len(steps), -1)[:, : w.shape[1]]
        return codes

    def takes_part_group(self, in_features: int) -> bool:
        """What fills a group up would be zeros."""
        return False

    def _bytes_of_scales(self, blocks: int, scale_bytes: int) -> int:
        return blocks + 1 if self.coarse_scales else blocks * scale_bytes

    def family(self, activation: ActivationFormat | None) -> str:
        return "w2a16_g64"
