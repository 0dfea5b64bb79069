"""bitsandbytes: 4-bit codes of a table (QLoRA, arXiv 2305.14314), and int8 (LLM.int8(), arXiv 2208.07339).

4 bits, over the weight [N, K] flattened:
    weight            uint8 [N * K / 2, 1], or the same bytes as another dtype; the first of two codes in the high bits
    weight.absmax     float32 [blocks]; with double quantization uint8, indices of the nested map
    weight.quant_map  float32 [16], the table
    weight.nested_absmax, weight.nested_quant_map    float32 [blocks / 256] and [256]
    weight.quant_state.bitsandbytes__nf4             JSON in bytes: shape, block sizes, and an offset of absmax
    weight = table[code] * absmax,    absmax = nested_quant_map[index] * nested_absmax + nested_offset
A block may begin in one row and end in the next. The CPU kernel of bitsandbytes 0.50.2 reads the scales of such weights
wrongly (48 x 96 in blocks of 64: values off by 2 where they are off by 0.4), and multiplies in bfloat16.
8 bits:
    weight int8 [N, K], SCB float32 [N]              weight = code * SCB / 127
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.formats import GROUP_SIZES, QuantizedWeight, Scheme
from ...quant.formats.codebooks import CodebookFormat
from ...quant.packing import unpack_high_first
from .base import (
    REQUANTIZE,
    CodedCheckpoint,
    CodedWeight,
    Given,
    Header,
    Read,
    Section,
    beside,
    coded_checkpoint,
    expect,
    siblings,
)
from .grids import StoredGrid

_STATE = ".weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@coded_checkpoint
@dataclass(frozen=True)
class BitsAndBytes(CodedCheckpoint):
    """A config's settings.

    Attributes:
        form: in words.
    """

    title = "bitsandbytes"
    form: str

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("load_in_4bit"):
            twice = ", double quantization" if said.get("bnb_4bit_use_double_quant") else ""
            return cls(f"{said.get('bnb_4bit_quant_type', 'fp4')}{twice}")
        return cls("int8") if said.get("load_in_8bit") else None

    @property
    def described(self) -> str:
        return f"bitsandbytes, {self.form}"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        tables = [self._table(name, tensors, read) for name in sorted(tensors) if _STATE in name]
        return [*tables, *(_int8(path, name, tensors) for path, name in siblings(tensors, ".SCB"))]

    def _table(self, state: str, tensors: Mapping[str, Header], read: Read) -> "TableWeight":
        path, _, kind = state.partition(_STATE)
        try:
            said = json.loads(bytes(read(state).tolist()).decode("utf-8"))
            (n, k), block = said["shape"], int(said["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise CaptureError(f"does not describe a weight that can be read ({error})", place=state) from None
        size = math.gcd(block, k)
        scheme, kept = _scheme(kind, size, block)
        parts = (f"{path}.weight", expect(tensors, f"{path}.weight.absmax", (-(-n * k // block),)),
                 expect(tensors, f"{path}.weight.quant_map", (16,)), state)  # fmt: skip
        nested = beside(tensors, path, _NESTED)
        if parts[0] not in tensors or bool(nested) != ("nested_offset" in said):
            raise CaptureError("lacks tensors of its 4-bit weight", place=state, remedy=REQUANTIZE)
        offset, run = float(said.get("nested_offset", 0)), int(said.get("nested_blocksize", 1))
        return TableWeight(
            parts[0], (n, k), (*parts, *nested), scheme, kept, "F32", block, size, offset, run
        )  # fmt: skip


def _scheme(kind: str, size: int, block: int) -> tuple[Scheme | None, str]:
    """The scheme of a table in blocks, as many of which as need be share a scale.

    Args:
        size: of blocks that do not cross the rows of the weight; block: of those that have a scale.
    """
    if kind not in ("nf4", "fp4"):
        return None, f"no kernel takes codes of {kind}, so that it becomes float"
    if size not in GROUP_SIZES:
        return None, f"its blocks of {block} cross its rows, which no kernel takes, so that it becomes float"
    kept = "as stored" if size == block else f"blocks of {block} as blocks of {size} with the same scale"
    return Scheme.parse(kind if size == 64 else f"{kind}_g{size}"), kept


@dataclass(frozen=True)
class TableWeight(CodedWeight):
    """4 bits; see the top of this file.

    Attributes:
        block: codes to a scale, over the flattened weight; size: the largest part of it that lies within a row.
        offset, run: of nested scales: what is added to each, and how many share one of their own.
    """

    block: int
    size: int
    offset: float
    run: int

    def decode(self, read: Read) -> Given | Tensor:
        n, k = self.shape
        packed = read(self.parts[0]).reshape(-1).view(torch.uint8)
        codes = unpack_high_first(packed, n * k).view(n, k)
        absmax, table = self._absmax(read), read(self.parts[2]).float()
        fmt = None if self.scheme is None else self.scheme.weight
        if not isinstance(fmt, CodebookFormat):
            return table[codes.long()] * absmax.repeat_interleave(self.block)[: n * k].view(n, k)
        if not torch.allclose(fmt.table(), table, rtol=0, atol=1e-7):
            raise CaptureError(f"is not the table of {fmt.name}", place=self.parts[2])
        scale = absmax.repeat_interleave(self.block // self.size)[: n * k // self.size].view(n, -1).contiguous()
        return Given(QuantizedWeight(codes, scale, None, fmt))

    def _absmax(self, read: Read) -> Tensor:
        """One for each block, float32."""
        stored = read(self.parts[1])
        if len(self.parts) == 4:
            return stored.float()
        nested, table = (read(part).double() for part in self.parts[4:])
        return (table[stored.long()] * nested.repeat_interleave(self.run)[: len(stored)] + self.offset).float()

    def formula(self, read: Read) -> Tensor:
        """Along the flattened weight: elements 0, 2, 4, ... are in the high halves of bytes."""
        n, k = self.shape
        stored, table = read(self.parts[0]).contiguous().view(torch.uint8).numpy().ravel(), read(self.parts[2])
        values = np.empty(2 * len(stored))
        values[0::2] = table.double().numpy()[stored // 16]
        values[1::2] = table.double().numpy()[stored % 16]
        absmax: Any = read(self.parts[1]).numpy()
        if len(self.parts) > 4:
            nested, indexed = (read(part).double().numpy() for part in self.parts[4:])
            absmax = indexed[absmax] * nested[np.arange(len(absmax)) // self.run] + self.offset
        values = values[: n * k] * np.repeat(absmax.astype(np.float64), self.block)[: n * k]
        return torch.from_numpy(values.reshape(n, k))


def _int8(path: str, scales: str, tensors: Mapping[str, Header]) -> "RowWeight":
    name = f"{path}.weight"
    if name not in tensors or tensors[name].dtype != "I8" or len(tensors[name].shape) != 2:
        raise CaptureError("is not a matrix of int8 codes", place=name, remedy=REQUANTIZE)
    n, k = tensors[name].shape
    expect(tensors, scales, (n,))
    grid = StoredGrid(8, k, True, k)
    scheme, kept = grid.container()
    parts = (name, scales, *beside(tensors, path, ("weight_format",)))
    return RowWeight(name, (n, k), parts, scheme, kept, "F32", grid)


@dataclass(frozen=True)
class RowWeight(CodedWeight):
    """8 bits; see the top of this file. LLM.int8() rounds inputs besides, all but outliers; here they stay float.

    Attributes:
        grid: of its codes.
    """

    grid: StoredGrid

    def decode(self, read: Read) -> Given | Tensor:
        codes, scale = read(self.parts[0]), read(self.parts[1]).float().view(-1, 1) / 127
        raised = (codes.to(torch.int16) + 128).to(torch.uint8)
        if self.scheme is None:
            return codes.float() * scale
        return Given(self.grid.weight(raised, scale, None, self.scheme))

    def formula(self, read: Read) -> Tensor:
        """Row by row."""
        codes, scales = read(self.parts[0]), read(self.parts[1]).double().tolist()
        return torch.stack([row.double() * scale / 127 for row, scale in zip(codes, scales, strict=True)])
