"""Ternary weights: -1, 0 and 1 times a scale (arXiv 1605.04711), in the 2-bit codes that the kernels read."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import NumericsError
from ..affine import FINITE_REMEDY, row_chunks
from ..grids import ActivationFormat
from .base import group_size, weight_format
from .integer import IntegerCodes
from .stepped import nonzero

_THRESHOLD = 0.7  # of the mean magnitude of a group: what is below becomes zero (section 2.2 of the paper)
_RATIOS = (1.0, *(1 + i / 20 for i in range(-8, 9) if i))


@weight_format
@dataclass(frozen=True)
class Ternary(IntegerCodes):
    """`ternary_g{16..1024}`."""

    bits: int = field(default=2, init=False)
    group_size: int = 64
    symmetric: bool = field(default=True, init=False)
    stem = "ternary"
    options = r"_g(?P<group>\d+)"
    examples = ("ternary_g64",)
    short = {"ternary": "ternary_g64"}

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["Ternary", ActivationFormat | None]:
        return cls(group_size=group_size(match, match["group"])), None

    @property
    def qmin(self) -> int:
        return -1

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        """The mean magnitude of what is above a share of the mean magnitude of the group."""
        scale = torch.empty(len(w), self.groups(w.shape[1]), dtype=torch.float32, device=w.device)
        for rows, chunk in row_chunks(w, self):
            size = chunk.float().abs()
            kept = size > _THRESHOLD * size.mean(-1, keepdim=True)
            scale[rows] = size.mul_(kept).sum(-1) / kept.sum(-1).clamp_min(1)
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("the weight has NaN or Inf, or a range beyond float32", remedy=FINITE_REMEDY)
        return nonzero(scale), None

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, None]:
        scale, _ = self.scales(w)
        return self.best_scales(w, [nonzero(scale * ratio) for ratio in _RATIOS], importance), None

    def family(self, activation: ActivationFormat | None) -> str:
        return "w2a16_g64"
