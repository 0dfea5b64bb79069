"""BitNet b1.58 (arXiv 2402.17764) as transformers writes it: every weight is -1, 0 or 1 times one scale.

weight        uint8 [N / 4, K]  code + 1 of rows r, r + N / 4, r + N / 2, r + 3N / 4, the first in the lowest bits
weight_scale  float [1]         codes are multiplied by it, or divided by that of BitLinear
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from .base import CodedCheckpoint, CodedWeight, Given, Header, Read, Section, coded_checkpoint, expect, siblings
from .grids import StoredGrid


@coded_checkpoint
@dataclass(frozen=True)
class BitNet(CodedCheckpoint):
    """A config's settings.

    Attributes:
        divides: the scale is what codes are divided by.
    """

    title = "BitNet"
    divides: bool

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") != "bitnet":
            return None
        if said.get("quantization_mode", "offline") != "offline":
            raise CaptureError(
                "its BitNet weights are stored in float and rounded on every run, which is not supported"
            )
        if said.get("use_rms_norm"):
            raise CaptureError("its BitNet linears normalize their inputs, which is not supported")
        return cls(said.get("linear_class", "bitlinear") == "bitlinear")

    @property
    def described(self) -> str:
        return "BitNet, ternary"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "BitNet rounds the inputs of its linears to 8 bits with a scale for each token; here they are rounded as "
            "accuracy_level says, or stay float",
        )  # fmt: skip

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [self._at(path, scale, tensors) for path, scale in siblings(tensors, ".weight_scale")]

    def _at(self, path: str, scale: str, tensors: Mapping[str, Header]) -> "TernaryWeight":
        name = f"{path}.weight"
        if name not in tensors or tensors[name].dtype != "U8" or len(tensors[name].shape) != 2:
            raise CaptureError("is not a matrix of bytes that hold four ternary codes each", place=name)
        quarter, k = tensors[name].shape
        expect(tensors, scale, (1,))
        grid = StoredGrid(2, k, symmetric=True, columns=k)
        scheme, kept = grid.container()
        dtype = "F32" if self.divides else tensors[scale].dtype
        return TernaryWeight(name, (4 * quarter, k), (name, scale), scheme, kept, dtype, grid, self.divides)


@dataclass(frozen=True)
class TernaryWeight(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes, which count from 1 there: its middle is 2. divides: see `BitNet`.
    """

    grid: StoredGrid
    divides: bool

    def decode(self, read: Read) -> Given | Tensor:
        packed, scale = read(self.parts[0]), read(self.parts[1]).float()
        codes = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
        if bool((codes == 3).any()):
            raise CaptureError("has codes other than -1, 0 and 1", place=self.parts[0])
        scale = (1 / scale if self.divides else scale).expand(self.shape[0], 1)
        if self.scheme is None:
            return (codes.float() - 1) * scale
        return Given(self.grid.weight(codes + 1, scale, None, self.scheme))

    def formula(self, read: Read) -> Tensor:
        """Row by row, as transformers unpacks them."""
        packed, scale = read(self.parts[0]).numpy(), float(read(self.parts[1]))
        rows = (packed[row % len(packed)] >> 2 * (row // len(packed)) & 3 for row in range(self.shape[0]))
        codes = np.stack([row.astype(np.float64) - 1 for row in rows])
        return torch.from_numpy(codes / scale if self.divides else codes * scale)
