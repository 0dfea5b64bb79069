"""GPTQ (arXiv 2210.17323) as AutoGPTQ and gptqmodel write it.

    qweight int32 [K * bits / 32, N]    codes along the input features, the first in the lowest bits
    qzeros  int32 [G, N * bits / 32]    zero points along the output features; in the first version minus 1
    scales  float [G, N]
    g_idx   int32 [K]                   the group of each input feature

weight[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]). With act-order the features of a group are
anywhere; sorted by their group they are in groups of one size, and the linear reads its input in that order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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
    Order,
    Read,
    Section,
    coded_checkpoint,
    expect,
    siblings,
)
from .grids import StoredGrid

_BITS = (2, 3, 4, 8)


@coded_checkpoint
@dataclass(frozen=True)
class GPTQ(CodedCheckpoint):
    """A config's settings for all linears, and for some by the patterns of `dynamic`.

    Attributes:
        bits, group_size (-1: one for each output feature), symmetric, act_order: for all that no pattern matches.
        minus_one: the first version: zero points are stored less 1.
        dynamic: by pattern, what is different.
    """

    title = "GPTQ"
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    minus_one: bool
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def match(cls, said: Section) -> Self | None:
        method = said.get("quant_method")
        if method != "gptq" and (method is not None or "desc_act" not in said or "w_bit" in said):
            return None
        form = said.get("checkpoint_format") or said.get("format") or "gptq"
        if said.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
            raise CaptureError(
                f"its GPTQ codes are in the layout {form if form != 'gptq' else 'marlin'} of a GPU kernel, which is "
                "not supported", remedy="Save them in the format gptq or gptq_v2, or export the float model",
            )  # fmt: skip
        if said.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise CaptureError(f"its GPTQ codes are packed in {said['pack_dtype']}; only int32 is supported")
        bits, size = said.get("bits"), said.get("group_size", -1)
        if bits not in _BITS or not isinstance(size, int):
            raise CaptureError(f"its config asks for GPTQ with {bits} bits in groups of {size}, which does not exist")
        dynamic = said.get("dynamic")
        return cls(
            bits, size, bool(said.get("sym", True)), bool(said.get("desc_act", False)), form == "gptq",
            dynamic if isinstance(dynamic, dict) else {},
        )  # fmt: skip

    @property
    def described(self) -> str:
        groups = f" in groups of {self.group_size}" if self.group_size > 0 else " with one scale per output feature"
        more = [*(["act-order"] if self.act_order else []), *(["settings by module"] if self.dynamic else [])]
        return ", ".join([f"GPTQ, {self.bits} bits{groups}", *more])

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [self._at(path, name, tensors) for path, name in siblings(tensors, ".qweight")]

    def _at(self, path: str, qweight: str, tensors: Mapping[str, Header]) -> "GPTQWeight":
        said = self._settings(path)
        bits, size, symmetric = (
            said.get("bits", self.bits), said.get("group_size", self.group_size), said.get("sym", self.symmetric)
        )  # fmt: skip
        if bits not in _BITS or tensors[qweight].dtype != "I32" or len(tensors[qweight].shape) != 2:
            raise CaptureError(
                f"is not a matrix of int32 words that hold {bits}-bit codes", place=qweight, remedy=REQUANTIZE
            )
        rows, n = tensors[qweight].shape
        k = rows * 32 // bits
        grid = StoredGrid(bits, size if 0 < size < k else k, bool(symmetric), k)
        scales = expect(tensors, f"{path}.scales", (grid.groups, n))
        qzeros = expect(tensors, f"{path}.qzeros", (grid.groups, n * bits // 32))
        parts = [qweight, qzeros, scales]
        if f"{path}.g_idx" in tensors:
            parts.append(expect(tensors, f"{path}.g_idx", (k,)))
        scheme, kept = grid.container()
        if scheme is not None and self.act_order and grid.groups > 1:
            kept += ", input features in the order of their groups"
        return GPTQWeight(
            f"{path}.weight", (n, k), tuple(parts), scheme, kept, tensors[scales].dtype, grid, self.minus_one
        )  # fmt: skip

    def _settings(self, path: str) -> Mapping[str, Any]:
        """Of the first pattern that matches a module; gptqmodel's `-:` patterns are of modules that are float."""
        for pattern, changes in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), path):
                return changes
        return {}


@dataclass(frozen=True)
class GPTQWeight(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes; minus_one: see `GPTQ`.
    """

    grid: StoredGrid
    minus_one: bool

    def decode(self, read: Read) -> Given | Tensor:
        qweight, qzeros, scales = (read(part) for part in self.parts[:3])
        codes = unpack_words(qweight.t().contiguous(), self.grid.bits)
        zeros = unpack_words(_plus_one(qzeros, self.grid.bits) if self.minus_one else qzeros, self.grid.bits)
        if self.minus_one and self.grid.bits == 3:  # whose fields lie across words
            zeros = (zeros + 1) & 7
        zeros, scale = zeros.t().contiguous(), scales.t().float().contiguous()
        order = self._order(read)
        if self.grid.symmetric and bool((zeros != 1 << (self.grid.bits - 1)).any()):
            raise CaptureError(
                f"has zero points other than {1 << (self.grid.bits - 1)}, but the config says all codes are symmetric",
                place=self.parts[1], remedy='Set "sym" to false in the config, or "checkpoint_format" to what it is',
            )  # fmt: skip
        if order is not None:
            codes = codes[:, order.features]
        if self.scheme is None:
            values = self.grid.values(codes, scale, zeros)
            return values if order is None else order.undo(values)
        zero_point = None if self.grid.symmetric else zeros
        return Given(self.grid.weight(codes, scale, zero_point, self.scheme), order)

    def _order(self, read: Read) -> Order | None:
        return None if len(self.parts) < 4 else self.grid.order(read(self.parts[3]).long(), self.parts[3])

    def formula(self, read: Read) -> Tensor:
        """As gptqmodel's TorchLinear dequantizes, over numpy's unsigned words."""
        bits, (n, k) = self.grid.bits, self.shape
        words, zero_words = (read(part).numpy().view(np.uint32) for part in self.parts[:2])
        scales = read(self.parts[2]).double().numpy()
        if self.minus_one and bits != 3:
            zero_words = zero_words + np.uint32((2**32 - 1) // (2**bits - 1))  # 1 in every field
        code = np.stack([_field(words, 0, row, bits) for row in range(k)])  # [K, N]
        zero = np.stack([_field(zero_words, 1, column, bits) for column in range(n)], axis=1)  # [G, N]
        if self.minus_one and bits == 3:
            zero = (zero + 1) % 8
        group = read(self.parts[3]).numpy() if len(self.parts) > 3 else np.arange(k) // self.grid.group
        return torch.from_numpy(scales[group] * (code - zero[group])).t().contiguous()


def _plus_one(words: Tensor, bits: int) -> Tensor:
    """1 more in every field, modulo 2^32 over words as gptqmodel does it: it writes such words by subtracting."""
    if bits == 3:
        return words
    ones = sum(1 << place for place in range(0, 32, bits))
    return words + ones


def _field(words: np.ndarray, axis: int, index: int, bits: int) -> np.ndarray:
    """Code number `index` along an axis of uint32 words, int64."""
    word, shift = divmod(index * bits, 32)
    found = np.take(words, word, axis).astype(np.uint64) >> np.uint64(shift)
    if shift + bits > 32:
        found |= np.take(words, word + 1, axis).astype(np.uint64) << np.uint64(32 - shift)
    return (found & np.uint64((1 << bits) - 1)).astype(np.int64)
