"""Weights of 8-bit floating point numbers with scales, whatever method writes them.

E4M3 numbers with a scale for each output feature, for all of them, or for tiles of 128 x 128, and with exponents for 32
features, are formats of their own. No kernel of the targets multiplies others, so they become float: what they stand
for, value by value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.formats import QuantizedWeight, Scheme
from .base import CodedWeight, Given, Header, Read

E4M3 = "F8_E4M3"  # as safetensors calls it
FLOAT8 = (E4M3, "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")


@dataclass(frozen=True)
class ScaledFloats(CodedWeight):
    """weight = stored value * scale of its block.

    Attributes:
        block: rows and columns that share a scale; the last ones of each axis may be fewer.
    """

    block: tuple[int, int]

    @classmethod
    def at(
        cls, name: str, scale: str, tensors: Mapping[str, Header], block: tuple[int, int] | None,
        others: tuple[str, ...] = (), stored: str = "",
    ) -> Self:  # fmt: skip
        """A weight, by the shape of its scale: one for all, one for each output feature, or one for each block.

        Args:
            block: rows and columns that share a scale, where the config names blocks.
            others: tensors beside it that mean nothing for its values.
            stored: the tensor that holds it, where that goes by another name.

        Raises:
            CaptureError: the scale has another shape.
        """
        stored = stored or name
        (n, k), of_scale = tensors[stored].shape, tensors[scale].shape
        if of_scale in ((), (1,), (1, 1)):
            block = (n, k)
        elif of_scale in ((n,), (n, 1)):
            block = (1, k)
        elif block is None or of_scale != (-(-n // block[0]), -(-k // block[1])):
            raise CaptureError(
                f"has shape {list(of_scale)}, which is neither one scale, nor one for each of {n} rows, nor one for "
                f"each block of the config ({block}) of a weight {n} x {k}", place=scale,
                remedy="The config does not belong to these weights",
            )  # fmt: skip
        own = _own(tensors[stored].dtype, tensors[scale].dtype, block, (n, k))
        scheme = Scheme.parse(own) if own else None
        kept = "as stored" if own else "no kernel takes such 8-bit floats, so that it becomes float"
        return cls(name, (n, k), (stored, scale, *others), scheme, kept, tensors[scale].dtype, block)

    def decode(self, read: Read) -> Given | Tensor:
        stored, scale = read(self.parts[0]), scale_values(read(self.parts[1])).float()
        (n, k), (rows, columns) = self.shape, self.block
        scale = scale.reshape(-(-n // rows), -(-k // columns))
        if self.scheme is not None:
            by_row = scale.repeat_interleave(rows, 0)[:n].contiguous()
            return Given(QuantizedWeight(stored.view(torch.uint8), by_row, None, self.scheme.weight))
        values = stored.float()
        return values * scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]

    def formula(self, read: Read) -> Tensor:
        """Block by block."""
        values, scales = read(self.parts[0]).double(), scale_values(read(self.parts[1])).double()
        (n, k), (rows, columns) = self.shape, self.block
        flat, of_block = scales.flatten().tolist(), 0
        out = torch.empty_like(values)
        for top in range(0, n, rows):
            for left in range(0, k, columns):
                part = slice(top, top + rows), slice(left, left + columns)
                out[part] = values[part] * flat[of_block]
                of_block += 1
        return out


def _own(numbers: str, scales: str, block: tuple[int, int], shape: tuple[int, int]) -> str:
    """The format that is this one; empty where none is."""
    if numbers != E4M3:
        return ""
    if scales in EXPONENTS:
        return "mxfp8" if block == (1, 32) and shape[1] % 32 == 0 else ""
    if block[1] == shape[1] and block[0] in (1, shape[0]):
        return "w8a16_fp8"
    return "w8a16_fp8_b128" if block == (128, 128) else ""


def scale_values(stored: Tensor) -> Tensor:
    """Scales of whatever dtype, as float numbers; uint8 ones are exponents."""
    return stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
