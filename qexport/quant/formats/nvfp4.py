"""NVFP4: E2M1 numbers, one E4M3 scale for every 16 features, and one float32 scale for the weight."""

import re
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from ..grids import ActivationFormat
from ..small_floats import E4M3_LARGEST, E4M3_SMALLEST, e4m3_codes, e4m3_values
from .base import weight_format
from .small_floats import SmallFloatFormat
from .stepped import nonzero


@weight_format
@dataclass(frozen=True)
class NVFP4(SmallFloatFormat):
    """`nvfp4`.

    Attributes:
        tensor_scale: of one weight; 0 where it is still to be found.
    """

    bits: int = field(default=4, init=False)
    group_size: int = field(default=16, init=False)
    tensor_scale: float = field(default=0.0, compare=False)
    name = stem = "nvfp4"
    examples = ("nvfp4",)

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["NVFP4", ActivationFormat | None]:
        return cls(), None

    def for_weight(self, w: Tensor) -> Self:
        """With the scale that gives the largest block the largest E4M3 number."""
        if self.tensor_scale:
            return self
        largest = nonzero(self.absmax(w).max() / (self.largest * E4M3_LARGEST))
        return replace(self, tensor_scale=float(largest))

    def scales_for(self, absmax: Tensor) -> Tensor:
        whole = torch.tensor(self.tensor_scale, device=absmax.device)
        return e4m3_values(self._codes(absmax / self.largest / whole)) * whole

    def stored_scale(self, scale: Tensor) -> Tensor:
        return self._codes(scale / torch.tensor(self.tensor_scale, device=scale.device))

    def read_scale(self, stored: Tensor, tensor_scale: Tensor | None, rows: int) -> Tensor:
        if tensor_scale is None:
            raise TypeError("a scale of the whole weight is missing")
        return e4m3_values(stored) * tensor_scale.float()

    @staticmethod
    def _codes(x: Tensor) -> Tensor:
        return e4m3_codes(x.clamp_min(E4M3_SMALLEST))

    def family(self, activation: ActivationFormat | None) -> str:
        return "nvfp4"

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        n, k = shape
        return n * k // 2 + n * self.groups(k) + 4
