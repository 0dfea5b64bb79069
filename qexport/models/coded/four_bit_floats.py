"""Weights of 4-bit floating point numbers with scales by groups, whatever method writes them (MXFP4, NVFP4).

    packed  uint8 [N, K / 2]   two codes to a byte, the first in the low bits: a sign, two bits of exponent, and one of
                               mantissa
    scale   uint8 or float8 [N, K / group]   an exponent (2^(byte - 127)), or an 8-bit float
    second  float32 []         of all groups, of NVFP4: they are multiplied by it, or divided

weight = value * scale * second. Groups of 32 with exponents and of 16 with 8-bit floats are formats of their own. Of
others twice a value is a whole number of -12 to 12, so that 8-bit integers with half the scale hold them. The tables
of 4 bits that kernels have do not: fp4 of bitsandbytes has another number in place of 0.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.formats import QuantizedWeight, Scheme
from ...quant.formats.nvfp4 import NVFP4
from ...quant.formats.small_floats import SmallFloatFormat
from ...quant.packing import unpack_rows
from .base import CodedWeight, Given, Header, Read, expect
from .grids import StoredGrid
from .scaled_floats import E4M3, EXPONENTS, scale_values

TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # the value of each code, times 2
_MIDDLE = 128
_OWN = {(True, 32): "mxfp4", (False, 16): "nvfp4"}  # whether scales are exponents, and input features to a scale
_KEPT = "4-bit floats as integers of 8 bits with half the scale"


@dataclass(frozen=True)
class FourBitFloats(CodedWeight):
    """See the top of this file; parts are packed, scale, and second where there is one.

    Attributes:
        grid: of its codes as integers.
        divides: scales are divided by the second one.
        seconds: whether there is one.
    """

    grid: StoredGrid
    divides: bool = False
    seconds: bool = False

    @classmethod
    def at(
        cls, name: str, packed: str, scale: str, tensors: Mapping[str, Header], second: str = "", *,
        divides: bool = False, others: tuple[str, ...] = (), note: str = "",
    ) -> Self:  # fmt: skip
        """A weight, by the shapes of its tensors.

        Args:
            name: of the float tensor that it stands for; packed, scale, second: of its parts.
            others: tensors beside it that mean nothing for its values.
            note: on how it is kept.

        Raises:
            CaptureError: they do not belong together.
        """
        if tensors[packed].dtype != "U8" or len(tensors[packed].shape) != 2:
            raise CaptureError("is not a matrix of bytes that hold two 4-bit floats each", place=packed)
        (n, half), of_scale = tensors[packed].shape, tensors[scale]
        k, groups = 2 * half, of_scale.shape[-1] if of_scale.shape else 0
        if of_scale.shape != (n, groups) or not groups or k % groups or of_scale.dtype not in (*EXPONENTS, E4M3):
            raise CaptureError(
                f"is of {of_scale.dtype} {list(of_scale.shape)}, which are no exponents or 8-bit floats of groups of a "
                f"weight {n} x {k}", place=scale, remedy="The config does not belong to these weights",
            )  # fmt: skip
        if second:
            expect(tensors, second, (1,) if tensors[second].shape == (1,) else ())
        grid = StoredGrid(8, k // groups, symmetric=True, columns=k)
        own = _OWN.get((of_scale.dtype in EXPONENTS, grid.group))
        scheme: Scheme | None
        if own is not None and not (second and of_scale.dtype in EXPONENTS):
            scheme, kept = Scheme.parse(own), f"as stored{note}"
        else:
            scheme, kept = grid.container()
            kept = f"{_KEPT}{note}" if scheme is not None else kept
        dtype = "BF16" if of_scale.dtype in EXPONENTS else "F32" if second else "F16"
        parts = (packed, scale, *((second,) if second else ()), *others)
        return cls(name, (n, k), parts, scheme, kept, dtype, grid, divides, bool(second))

    def decode(self, read: Read) -> Given | Tensor:
        packed, scale = read(self.parts[0]).reshape(self.shape[0], -1), self._scale(read)
        codes = unpack_rows(packed, 4, self.grid.columns)
        if self.scheme is not None and isinstance(self.scheme.weight, SmallFloatFormat):
            return Given(self._as_they_are(codes, self.scheme.weight, scale.float(), read))
        twice = torch.tensor(TWICE, dtype=torch.int16)[codes.long()]
        scale = (scale / 2).float()
        if self.scheme is None:
            return twice.float() * scale.repeat_interleave(self.grid.group, 1)
        return Given(self.grid.weight((twice + _MIDDLE).to(torch.uint8), scale, None, self.scheme))

    def _as_they_are(self, codes: Tensor, fmt: SmallFloatFormat, scale: Tensor, read: Read) -> QuantizedWeight:
        """With a scale above zero for every group, which one of nothing but zeros need not have."""
        size = self.grid.group
        empty = ((codes & 7) == 0).view(len(codes), -1, size).all(-1) | (scale == 0)
        codes = codes.masked_fill(empty.repeat_interleave(size, 1), 0)
        if isinstance(fmt, NVFP4):
            second = read(self.parts[2]).double().reshape(()) if self.seconds else torch.ones((), dtype=torch.float64)
            whole = (1 / second if self.divides else second).float()
            scale = read(self.parts[1]).float() * whole
            fmt = replace(fmt, tensor_scale=float(whole))
        largest = scale.masked_fill(empty, 0).max()
        return QuantizedWeight(codes, scale.masked_fill(empty, largest if largest > 0 else 1), None, fmt)

    def _scale(self, read: Read) -> Tensor:
        """[N, groups], float64, the second one in it as float32 rounds it."""
        scale = scale_values(read(self.parts[1])).double()
        if not self.seconds:
            return scale
        second = read(self.parts[2]).double().reshape(())
        return scale / second if self.divides else scale * second

    def formula(self, read: Read) -> Tensor:
        """Group by group, from the bits of each code."""
        (n, k) = self.shape
        packed = read(self.parts[0]).numpy().reshape(n, k // 2)
        stored = read(self.parts[1])
        second = float(read(self.parts[2])) if self.seconds else 1.0
        out = torch.empty(n, k, dtype=torch.float64)
        values = [_value(code) for code in range(16)]
        table = torch.tensor([[values[byte & 15], values[byte >> 4]] for byte in range(256)], dtype=torch.float64)
        size = self.grid.group
        for group in range(k // size):
            column = stored[:, group]
            if column.dtype == torch.float8_e4m3fn:
                scales = column.double()
            else:
                powers = [float("nan") if e == 255 else 2.0 ** (e - 127) for e in column.view(torch.uint8).tolist()]
                scales = torch.tensor(powers, dtype=torch.float64)
            scales = scales / second if self.divides else scales * second
            bytes_of = torch.from_numpy(packed[:, group * size // 2 : (group + 1) * size // 2].astype("int64"))
            out[:, group * size : (group + 1) * size] = table[bytes_of].flatten(1) * scales[:, None]
        return out


def _value(code: int) -> float:
    """Of a 4-bit float: exponent 0 is subnormal."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if code & 8 else size
