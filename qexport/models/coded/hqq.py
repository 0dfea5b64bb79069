"""HQQ (mobiusml.github.io/hqq_blog) as its library saves linears in safetensors, with float zero points.

    W_q          codes of groups, [rows, columns] packed along the rows: code i * rows / parts + r of a column is in
                 row r, the first part in the highest bits: of uint8 8, 4, 2 or 1 bits, of int32 ten of 3 bits
    scale, zero  float [groups, 1]
    nbits, group_size, axis, shape, ...    what they are, in tensors of a few bytes

Groups are rows of the codes, along the flattened weight [N, K] (axis 1), or columns of them (axis 0).
weight = (code - zero) * scale. Kernels count from whole zero points: what is left is the offset of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from .base import (
    OFFSETS,
    REQUANTIZE,
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

_NO_KERNEL = ", which no kernel takes, so that it becomes float"
_PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes of a byte, or of a word of 3-bit ones, by their bits
# What the library puts beside codes besides: nothing of it changes what they stand for, in this form.
_OTHERS = (
    "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype",
    "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero", "nbits",
    "group_size", "shape",
)  # fmt: skip


@coded_checkpoint
@dataclass(frozen=True)
class HQQ(CodedCheckpoint):
    """What a config says of most linears; each says for itself what it is.

    Attributes:
        bits, group_size: None where the config does not say it.
    """

    title = "HQQ"
    bits: int | None
    group_size: int | None

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") != "hqq":
            return None
        inner: Any = said.get("quant_config") or {}
        of_weights = inner.get("weight_quant_params") or {}
        if inner.get("scale_quant_params") or inner.get("zero_quant_params"):
            raise CaptureError("its HQQ scales or zero points are quantized themselves, which is not supported")
        return cls(of_weights.get("nbits"), of_weights.get("group_size"))

    @property
    def described(self) -> str:
        if self.bits is None:
            return "HQQ, settings by linear"
        return f"HQQ, {self.bits} bits in groups of {self.group_size} with float zero points"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [self._at(path, name, tensors, read) for path, name in siblings(tensors, ".W_q")]

    def _at(self, path: str, packed: str, tensors: Mapping[str, Header], read: Read) -> "FloatZeros":
        said = {key: f"{path}.{key}" for key in ("nbits", "group_size", "axis", "shape", "view_as_float")}
        if missing := [name for name in said.values() if name not in tensors]:
            raise CaptureError("is missing from the checkpoint, which has the codes of its weight", place=missing[0])
        bits, size, axis = (int(read(said[key])) for key in ("nbits", "group_size", "axis"))
        n, k = (int(length) for length in read(said["shape"]))
        if bits not in _PARTS or int(read(said["view_as_float"])) or axis not in (0, 1) or n * k % size:
            raise CaptureError(
                f"is packed in a form that is not supported ({bits} bits)", place=packed, remedy=REQUANTIZE
            )
        rows, columns = (n * k // size, size) if axis else (size, n * k // size)
        expect(tensors, packed, (-(-rows // _PARTS[bits]), columns))
        shape = (rows, 1) if axis else (1, columns)
        parts = (packed, expect(tensors, f"{path}.scale", shape), expect(tensors, f"{path}.zero", shape))
        more = tuple(name for key in _OTHERS if (name := f"{path}.{key}") in tensors)
        grid = StoredGrid(bits, size, symmetric=True, columns=k)
        if axis == 0:
            scheme, kept = None, f"its groups lie along the output features{_NO_KERNEL}"
        elif k % size:
            scheme, kept = None, f"its groups of {size} cross its rows{_NO_KERNEL}"
        else:
            scheme, kept = grid.container()
            kept += OFFSETS if scheme is not None else ""
        return FloatZeros(
            f"{path}.weight", (n, k), (*parts, *more), scheme, kept, tensors[parts[1]].dtype, grid, axis
        )  # fmt: skip


@dataclass(frozen=True)
class FloatZeros(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes; axis: along which groups are.
    """

    grid: StoredGrid
    axis: int
    has_offset = True

    def decode(self, read: Read) -> Given | Tensor:
        bits, size, (n, k) = self.grid.bits, self.grid.group, self.shape
        rows = n * k // size if self.axis else size
        word, parts = read(self.parts[0]), _PARTS[bits]
        codes = torch.cat([(word >> bits * (parts - 1 - part)) & ((1 << bits) - 1) for part in range(parts)])[:rows]
        scale, zero = (read(part).double() for part in self.parts[1:3])
        if self.scheme is None:
            return ((codes.double() - zero) * scale).reshape(n, k).float()
        scale = scale.view(n, -1)
        offset = ((1 << (bits - 1)) - zero.view(n, -1)) * scale
        return Given(self.grid.weight(codes.to(torch.uint8).view(n, k), scale, None, self.scheme), offset=offset)

    def formula(self, read: Read) -> Tensor:
        """As hqq's Quantizer dequantizes, row by row of the codes."""
        bits, size, (n, k) = self.grid.bits, self.grid.group, self.shape
        word, (scale, zero) = read(self.parts[0]).numpy(), (read(part).double().numpy() for part in self.parts[1:3])
        rows, step = (n * k // size if self.axis else size), len(word)
        out = np.empty((rows, word.shape[1]))
        for row in range(rows):
            place = _PARTS[bits] - 1 - row // step
            code = word[row % step].astype(np.int64) // (1 << place * bits) % (1 << bits)
            out[row] = (code - zero[row if self.axis else 0]) * scale[row if self.axis else 0]
        return torch.from_numpy(out.reshape(n, k))
