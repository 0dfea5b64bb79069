"""AWQ (arXiv 2306.00978) as AutoAWQ writes it for its GEMM kernel.

    qweight int32 [K, N / 8]    4-bit codes along the output features, eight to a word
    qzeros  int32 [G, N / 8]    zero points in the same way
    scales  float [G, N]

A word holds the features 0, 2, 4, 6, 1, 3, 5, 7 of its eight, the first in the lowest bits.
weight[k, n] = (code[k, n] - zero[k / group, n]) * scales[k / group, n]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.packing import unpack_words
from .base import (
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

_IN_A_WORD = (0, 2, 4, 6, 1, 3, 5, 7)


@coded_checkpoint
@dataclass(frozen=True)
class AWQ(CodedCheckpoint):
    """A config's settings.

    Attributes:
        group_size: -1 for one scale for each output feature.
    """

    title = "AWQ"
    group_size: int

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method", "awq") != "awq" or (
            "quant_method" not in said and "w_bit" not in said and "q_group_size" not in said
        ):
            return None
        version = str(said.get("version", said.get("format", "gemm"))).lower()
        bits = said.get("bits", said.get("w_bit", 4))
        size = said.get("group_size", said.get("q_group_size", 128))
        if version != "gemm" or bits != 4 or not isinstance(size, int):
            raise CaptureError(
                f"its AWQ codes have {bits} bits in groups of {size} in the layout {version}; only 4 bits in "
                "the layout gemm are supported",
                remedy="Save them that way, or export the float model that they were made from",
            )  # fmt: skip
        return cls(size)

    @property
    def described(self) -> str:
        groups = f"in groups of {self.group_size}" if self.group_size > 0 else "with one scale per output feature"
        return f"AWQ, 4 bits {groups}"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [self._at(path, name, tensors) for path, name in siblings(tensors, ".qweight")]

    def _at(self, path: str, qweight: str, tensors: Mapping[str, Header]) -> "AWQWeight":
        if tensors[qweight].dtype != "I32" or len(tensors[qweight].shape) != 2:
            raise CaptureError("is not a matrix of int32 words that hold 4-bit codes", place=qweight, remedy=REQUANTIZE)
        k, words = tensors[qweight].shape
        grid = StoredGrid(4, self.group_size if 0 < self.group_size < k else k, False, k)
        qzeros = expect(tensors, f"{path}.qzeros", (grid.groups, words))
        scales = expect(tensors, f"{path}.scales", (grid.groups, words * 8))
        scheme, kept = grid.container()
        parts = (qweight, qzeros, scales)
        return AWQWeight(f"{path}.weight", (words * 8, k), parts, scheme, kept, tensors[scales].dtype, grid)


@dataclass(frozen=True)
class AWQWeight(CodedWeight):
    """See the top of this file; grid: of its codes."""

    grid: StoredGrid

    def decode(self, read: Read) -> Given | Tensor:
        qweight, qzeros, scales = (read(part) for part in self.parts)
        codes, zeros = (in_order(unpack_words(words, 4)) for words in (qweight, qzeros))
        scale = scales.t().float().contiguous()
        if self.scheme is None:
            return self.grid.values(codes, scale, zeros)
        return Given(self.grid.weight(codes, scale, zeros, self.scheme))

    def formula(self, read: Read) -> Tensor:
        """Feature by feature, from the place of each in its word."""
        words, zero_words = (read(part).numpy().view(np.uint32) for part in self.parts[:2])
        scales = read(self.parts[2]).double().numpy()
        rows = []
        for feature in range(self.shape[0]):
            word, shift = feature // 8, np.uint32(4 * _IN_A_WORD.index(feature % 8))
            code, zero = (((w[:, word] >> shift) & np.uint32(15)).astype(np.int64) for w in (words, zero_words))
            group = np.arange(self.grid.columns) // self.grid.group
            rows.append((code - zero[group]) * scales[group, feature])
        return torch.from_numpy(np.stack(rows))


def in_order(columns: Tensor) -> Tensor:
    """Codes [rows, N], eight by eight as they lie in words, as [N, rows] in the order of the features."""
    rows, n = columns.shape
    out = torch.empty_like(columns).view(rows, n // 8, 8)
    out[:, :, list(_IN_A_WORD)] = columns.view(rows, n // 8, 8)
    return out.view(rows, n).t().contiguous()
