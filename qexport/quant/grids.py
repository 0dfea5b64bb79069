"""Grids of evenly spaced values: how many codes there are, and which weights share a scale."""

from dataclasses import dataclass

from torch import Tensor

from .coarse_scales import coarse
from .small_floats import E4M3_LARGEST, E4M3_SMALLEST, e4m3_codes, e4m3_values

PER_CHANNEL = 0
PER_TENSOR = -1
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class GroupedCodes:
    """Codes of few bits, and which of them share a scale.

    Attributes:
        bits: of a code.
        group_size: how many consecutive input features share one scale; PER_CHANNEL (0): one scale for each output
            feature; PER_TENSOR (-1): one scale.
    """

    bits: int
    group_size: int = PER_CHANNEL

    def groups(self, in_features: int) -> int:
        """Number of scales along the input features; the last group may be a part of one."""
        return -(-in_features // self.group_size) if self.group_size > 0 else 1

    @property
    def has_coarse_scales(self) -> bool:
        """Whether the file keeps scales in 8 bits, see `coarse_scales`."""
        return False

    def kept_scale(self, scale: Tensor) -> Tensor:
        """The scales, float32 [N, G], that these are rounded to because the file has no others."""
        return coarse(scale) if self.has_coarse_scales else scale


@dataclass(frozen=True)
class AffineGrid(GroupedCodes):
    """Values (code - zero_point) * scale.

    Attributes:
        bits: 2 to 6, or 8.
        symmetric: signed codes around zero; otherwise unsigned codes with a zero point, zero always representable.
    """

    symmetric: bool = True

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True)
class ActivationFormat:
    """A symmetric grid of integers, or of E4M3 numbers, for the input of a linear.

    Attributes:
        kind: "static" (one calibrated scale for the tensor) or "dynamic" (one scale per token, taken when it runs).
        bits: 8, or 4: 4-bit codes in int8 tensors, the numbers of W4A4 at the speed of W4A8.
        e4m3: 8-bit floats in the place of integers; static only.
    """

    kind: str
    bits: int = 8
    e4m3: bool = False

    @property
    def qmax(self) -> int:
        """The largest value in steps."""
        return int(E4M3_LARGEST) if self.e4m3 else (1 << (self.bits - 1)) - 1

    @property
    def zero_below(self) -> float:
        """What rounds to zero is at most so many steps."""
        return E4M3_SMALLEST / 2 if self.e4m3 else 0.5

    def round_steps(self, steps: Tensor) -> Tensor:
        """Float32 numbers in steps, rounded to values of the grid."""
        if self.e4m3:
            return e4m3_values(e4m3_codes(steps))
        return steps.round().clamp_(-self.qmax, self.qmax)
