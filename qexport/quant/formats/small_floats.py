"""What weights of 4-bit and 8-bit floats share: elements, and scales that are floats of few bits themselves."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..small_floats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    e8m0_codes,
    e8m0_values,
)
from .base import parse
from .stepped import ScaledFormat

_FURTHEST = 2.0**-15


class SmallFloatFormat(ScaledFormat, ABC):
    """E2M1 or E4M3 numbers times scales. Codes are uint8, the bits of the numbers.

    Attributes:
        name: of the format without what becomes of its inputs; `format_named` finds it again.
        integers: E2M1 numbers times two are integers from -12 to 12.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def stored_scale(self, scale: Tensor) -> Tensor:
        """The scales of a weight [N, G] as the file has them: codes uint8, or float32; rows that share one have one."""

    @abstractmethod
    def read_scale(self, stored: Tensor, tensor_scale: Tensor | None, rows: int) -> Tensor:
        """float32 [rows, G] of what `stored_scale` made.

        Args:
            tensor_scale: float32 [], of formats with scales of two levels.
        """

    @property
    def integers(self) -> bool:
        return self.bits == 4

    def nearest(self, steps: Tensor) -> Tensor:
        return e2m1_codes(steps) if self.bits == 4 else e4m3_codes(steps)

    def values(self, codes: Tensor) -> Tensor:
        return e2m1_values(codes) if self.bits == 4 else e4m3_values(codes)

    @property
    def largest(self) -> float:
        """The largest value."""
        return E2M1_LARGEST if self.bits == 4 else E4M3_LARGEST

    def fit(self, in_features: int, whole: bool = False) -> tuple[Self | None, str]:
        """Groups have one size."""
        if self.group_size <= 0 or in_features % self.group_size == 0:
            return self, ""
        if not whole and self.takes_part_group(in_features):
            return self, ""
        return None, f"{in_features} input features do not divide into groups of {self.group_size}"

    @property
    def own_kernel(self) -> bool:
        return True

    @property
    def interchangeable(self) -> bool:
        return True


class MicroscaledFormat(SmallFloatFormat, ABC):
    """One power of two for every 32 features (OCP Microscaling Formats 1.0)."""

    # One octave more and one less than the standard's rule, which lets the largest of a block saturate.
    ratios: ClassVar[tuple[float, ...]] = (1, 2, 0.5)

    def scales_for(self, absmax: Tensor) -> Tensor:
        """The standard's: 2^(floor(log2(absmax)) - exponent of the largest value).

        A group far below the largest of its weight has the scale of one that is not so far: CUDA's kernel for FP4 holds
        scales in E4M3, which reaches over 17 octaves, and a search for clipping wants two of them.
        """
        largest = absmax.max().clamp_min(torch.finfo(torch.float32).tiny)
        exponent = _exponent(absmax.maximum(largest * _FURTHEST))
        return e8m0_values(e8m0_codes(exponent - _exponent(torch.tensor(self.largest))))

    def stored_scale(self, scale: Tensor) -> Tensor:
        return e8m0_codes(_exponent(scale))

    def read_scale(self, stored: Tensor, tensor_scale: Tensor | None, rows: int) -> Tensor:
        return e8m0_values(stored)

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        n, k = shape
        return n * k * self.bits // 8 + n * self.groups(k)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2(x)) of positive float32 numbers, exactly."""
    return torch.frexp(x).exponent - 1


def decoded(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, name: str) -> Tensor:
    """The weight float32 [N, K] that codes stand for.

    Args:
        codes: uint8 [N, K].
        scale: as `stored_scale` made it.
        tensor_scale: see `SmallFloatFormat.read_scale`.
        name: of the format.
    """
    fmt = format_named(name)
    return fmt.decode(codes, fmt.read_scale(scale, tensor_scale, len(codes)), None)


def format_named(name: str) -> SmallFloatFormat:
    """The format of this name.

    Raises:
        TypeError: it is none of small floats.
    """
    fmt = parse(name)[0]
    if not isinstance(fmt, SmallFloatFormat):
        raise TypeError(f"{name} has no small floats")
    return fmt
