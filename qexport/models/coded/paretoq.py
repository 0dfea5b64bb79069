"""ParetoQ (arXiv 2502.02631): float weights that its linears round whenever they run, to 1 to 4 bits.

    weight           float [N, K]
    weight_clip_val  float [N, 1]

With s the clip value, 1e-5 at least:
    1 bit            sign(weight) * s
    ternary (0)      round(clamp(weight / s, -0.99, 0.99) * 1.5) / 1.5 * s
    2 bits           (round(clamp(weight / s, -0.99, 0.99) * 2 - 0.5) + 0.5) / 2 * s
    3 and 4 bits     clamp(round(weight / s), -2^(bits - 1), 2^(bits - 1) - 1) * s
The rounding is done here once. The four values of 2 bits are odd multiples of s / 4: codes around 0 and an offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from .base import (
    OFFSETS,
    CodedCheckpoint,
    CodedWeight,
    Given,
    Header,
    Read,
    Section,
    coded_checkpoint,
    expect,
    siblings,
)
from .grids import StoredGrid

METHOD = "paretoq"
_CLIP, _LEAST = 1 - 1e-2, 1e-5


@coded_checkpoint
@dataclass(frozen=True)
class ParetoQ(CodedCheckpoint):
    """A config's settings.

    Attributes:
        bits: 0 for ternary.
    """

    title = "ParetoQ"
    bits: int

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") != METHOD:
            return None
        bits = said.get("w_bits")
        if not isinstance(bits, int) or bits not in range(5):
            raise CaptureError(f"its config asks for ParetoQ with {bits} bits, which does not exist")
        return cls(bits)

    @property
    def described(self) -> str:
        return f"ParetoQ, {f'{self.bits} bits' if self.bits else 'ternary'} with one scale per output feature"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [self._at(path, clip, tensors) for path, clip in siblings(tensors, ".weight_clip_val")]

    def _at(self, path: str, clip: str, tensors: Mapping[str, Header]) -> "ClippedWeight":
        name = f"{path}.weight"
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CaptureError("is not a matrix, although it has clip values", place=name)
        n, k = tensors[name].shape
        expect(tensors, clip, (n, 1))
        grid = StoredGrid(max(self.bits, 2), k, symmetric=True, columns=k)
        scheme, kept = grid.container()
        if scheme is not None:
            kept = f"rounded as the checkpoint says, {kept}" + OFFSETS * (self.bits == 2)
        return ClippedWeight(name, (n, k), (name, clip), scheme, kept, "F32", grid, self.bits)


@dataclass(frozen=True)
class ClippedWeight(CodedWeight):
    """See the top of this file; grid: of its codes; bits: see `ParetoQ`."""

    grid: StoredGrid
    bits: int

    @property
    def has_offset(self) -> bool:
        return self.bits == 2

    def decode(self, read: Read) -> Given | Tensor:
        weight, clip = (read(part).float() for part in self.parts)
        clip = clip.clamp(min=_LEAST)
        offset = None
        if self.bits == 1:
            codes, scale = weight.sign(), clip
        elif self.bits == 0:
            codes, scale = ((weight / clip).clamp(-_CLIP, _CLIP) * 1.5).round(), clip / 1.5
        elif self.bits == 2:
            codes, scale = ((weight / clip).clamp(-_CLIP, _CLIP) * 2 - 0.5).round(), clip / 2
            offset = scale.double() / 2
        else:
            codes, scale = (weight / clip).round().clamp(-(1 << self.bits - 1), (1 << self.bits - 1) - 1), clip
        if self.scheme is None:
            return (codes.double() * scale.double() + (0 if offset is None else offset)).float()
        raised = (codes + (1 << self.grid.bits - 1)).to(torch.uint8)
        size = self.scheme.weight.group_size
        if offset is not None and size > 0:  # once for each of the smaller groups
            offset = offset.expand(-1, -(-self.shape[1] // size))
        return Given(self.grid.weight(raised, scale, None, self.scheme), offset=offset)

    def formula(self, read: Read) -> Tensor:
        """As its QuantizeLinear rounds in float32, row by row; what it makes of the rounded numbers in float64."""
        weight, clip = (read(part).float().numpy() for part in self.parts)
        levels, shift = {0: (1.5, 0.0), 2: (2.0, 0.5)}.get(self.bits, (1.0, 0.0))
        rows = []
        for row, (step,) in zip(weight, np.maximum(clip, np.float32(_LEAST)), strict=True):
            inside = row / step
            if self.bits == 1:
                rounded = np.sign(row)
            elif self.bits in (0, 2):
                rounded = np.round(np.clip(inside, -_CLIP, _CLIP).astype(np.float32) * levels - shift)
            else:
                rounded = np.clip(np.round(inside), -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
            rows.append((rounded.astype(np.float64) + shift) / levels * float(step))
        return torch.from_numpy(np.stack(rows))
