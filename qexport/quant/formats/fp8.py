"""FP8: E4M3 numbers, a float32 scale for each output feature or for each tile of 128 x 128."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from ..grids import PER_CHANNEL, ActivationFormat
from ..small_floats import E4M3_LARGEST
from .base import weight_format
from .small_floats import SmallFloatFormat
from .stepped import nonzero

_TILE = 128


@weight_format
@dataclass(frozen=True)
class FP8(SmallFloatFormat):
    """`w8a{16|8}_fp8[_b128]`; with `a8` inputs are E4M3 numbers too, with one calibrated scale."""

    bits: int = field(default=8, init=False)
    group_size: int = PER_CHANNEL
    stem = r"w8a(?P<a>16|8)_fp8"
    options = r"(?P<tiles>_b128)?"
    examples = ("w8a16_fp8", "w8a16_fp8_b128", "w8a8_fp8")
    short = {"fp8": "w8a16_fp8"}

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["FP8", ActivationFormat | None]:
        activation = ActivationFormat("static", e4m3=True) if match["a"] == "8" else None
        return cls(_TILE if match["tiles"] else PER_CHANNEL), activation

    @property
    def name(self) -> str:
        return "w8a16_fp8_b128" if self.group_size > 0 else "w8a16_fp8"

    @property
    def rows_per_scale(self) -> int:
        return _TILE if self.group_size > 0 else 1

    def scales_for(self, absmax: Tensor) -> Tensor:
        return nonzero(absmax / E4M3_LARGEST)

    def stored_scale(self, scale: Tensor) -> Tensor:
        return scale[:: self.rows_per_scale].contiguous()

    def read_scale(self, stored: Tensor, tensor_scale: Tensor | None, rows: int) -> Tensor:
        return stored if self.rows_per_scale == 1 else stored.repeat_interleave(self.rows_per_scale, 0)[:rows]

    def family(self, activation: ActivationFormat | None) -> str:
        return "w8a16"

    def takes_part_group(self, in_features: int) -> bool:
        """The last tile may be smaller."""
        return True

    @property
    def scales_in_sum(self) -> bool:
        """No product of integers."""
        return True

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        n, k = shape
        return n * k + 4 * -(-n // self.rows_per_scale) * self.groups(k)
