"""Quark of AMD, in its own form; what it saves in AWQ's is read as that.

    int4, uint4  in groups: weight int32 [K, N / 8], weight_scale [G, N], weight_zero_point int32 [G, N / 8]
                 by channel: weight int32 [N, K / 8], weight_scale [N], weight_zero_point int32 [N / 8]
    int8, uint8  in groups: weight [K, N], weight_scale [G, N], weight_zero_point [G, N]
                 by channel: weight [N, K], weight_scale [N], weight_zero_point [N]
    fp8          weight float8 [N, K], weight_scale [] or [N]
    fp4          weight uint8 [N, K / 2], weight_scale uint8 [N, K / 32], see four_bit_floats.py

A word holds the codes 0, 2, 4, 6, 1, 3, 5, 7 of its eight, the first in the lowest bits, or all in order; the last one
may be cut off. Codes of int4 and int8 are signed. weight = (code - zero point) * scale
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.packing import unpack_words
from .awq import in_order
from .base import (
    CACHE_LEFT_OUT,
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
    present,
    siblings,
)
from .four_bit_floats import FourBitFloats
from .grids import FLOAT_INPUTS, StoredGrid
from .scaled_floats import FLOAT8, ScaledFloats

_INTEGER = re.compile(r"(u?)int(4|8)$")
_OTHERS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "bias_scale", "bias_zero_point")
_IN_A_WORD = {True: (0, 2, 4, 6, 1, 3, 5, 7), False: tuple(range(8))}


@coded_checkpoint
@dataclass(frozen=True)
class Quark(CodedCheckpoint):
    """A config's settings.

    Attributes:
        everywhere: settings of linears; by_name: those of some, by a pattern of their names.
        reorder: words hold their codes in AWQ's order.
        cache: whether the config says how keys and values are quantized.
    """

    title = "Quark"
    everywhere: Mapping[str, Any]
    by_name: Mapping[str, Mapping[str, Any]]
    reorder: bool
    cache: bool = False

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") != "quark":
            return None
        form = said.get("export") or {}
        if form.get("weight_format", "real_quantized") != "real_quantized":
            raise CaptureError(f"its Quark weights are {form['weight_format']}, which is not supported")
        return cls(
            said.get("global_quant_config") or {}, said.get("layer_quant_config") or {},
            form.get("pack_method", "reorder") == "reorder", bool(said.get("kv_cache_quant_config")),
        )  # fmt: skip

    @property
    def described(self) -> str:
        settings = (self.everywhere, *self.by_name.values())
        said = dict.fromkeys(_in_words(part) for part in settings if part.get("weight"))
        return f"Quark, {', '.join(said)}" if said else "Quark"

    @property
    def notes(self) -> tuple[str, ...]:
        return (CACHE_LEFT_OUT,) if self.cache else ()

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [
            self._at(path, scale, tensors)
            for path, scale in siblings(tensors, ".weight_scale") if f"{path}.weight" in tensors
        ]  # fmt: skip

    def _at(self, path: str, scale: str, tensors: Mapping[str, Header]) -> CodedWeight:
        name, said = f"{path}.weight", self._settings(path)
        of, others = said.get("weight") or {}, beside(tensors, path, _OTHERS)
        header = tensors[name]
        if header.dtype in FLOAT8:
            return ScaledFloats.at(name, scale, tensors, None, others)
        if header.dtype == "U8" and of.get("dtype") in ("fp4", "mx"):
            note = FLOAT_INPUTS if said.get("input_tensors") else ""
            return FourBitFloats.at(name, name, scale, tensors, others=others, note=note)
        kind, scheme = _INTEGER.match(str(of.get("dtype"))), of.get("qscheme")
        if kind is None or scheme not in ("per_group", "per_channel", "per_tensor") or len(header.shape) != 2:
            raise CaptureError(
                f"is {of.get('dtype')} {scheme}, which is not supported for Quark", place=name, remedy=REQUANTIZE
            )  # fmt: skip
        return self._integers(path, scale, said, int(kind[2]), not kind[1], tensors)

    def _integers(
        self, path: str, scale: str, said: Mapping[str, Any], bits: int, signed: bool, tensors: Mapping[str, Header]
    ) -> "QuarkWeight":  # fmt: skip
        name, of = f"{path}.weight", said["weight"]
        grouped, each = of["qscheme"] == "per_group", 8 if bits == 4 else 1
        rows, columns = tensors[name].shape
        one = tensors[scale].shape in ((), (1,)) and not grouped
        n, k = (tensors[scale].shape[-1], rows) if grouped else (rows, columns * each)
        symmetric = bool(of.get("symmetric")) and signed
        grid = StoredGrid(bits, int(of["group_size"]) if grouped else k, symmetric, k)
        expect(tensors, name, (k, -(-n // each)) if grouped else (n, k // each))
        if not one:
            expect(tensors, scale, (grid.groups, n) if grouped else (n,))
        zero = f"{path}.weight_zero_point"
        if zero in tensors and not one:
            expect(tensors, zero, (grid.groups, -(-n // each)) if grouped else (-(-n // each),))
        elif zero not in tensors and not symmetric:
            present(tensors, zero)
        inputs, note = _inputs(said.get("input_tensors"), f"{path}.input_scale" in tensors)
        scheme, kept = grid.container(inputs)
        parts = (name, scale, *((zero,) if zero in tensors else ()), *beside(tensors, path, _OTHERS))
        return QuarkWeight(
            name, (n, k), parts, scheme, kept + note, tensors[scale].dtype, grid, path, signed, grouped, self.reorder
        )  # fmt: skip

    def _settings(self, path: str) -> Mapping[str, Any]:
        return next((said for pattern, said in self.by_name.items() if fnmatch(path, pattern)), self.everywhere)


def _in_words(said: Mapping[str, Any]) -> str:
    of, inputs = said["weight"], said.get("input_tensors") or {}
    size = of.get("group_size")
    where = f"in groups of {size}" if of.get("qscheme") == "per_group" else str(of.get("qscheme")).replace("_", " ")
    return f"{of.get('dtype')} {where}" + (f" with {inputs.get('dtype')} inputs" if inputs else "")


def _inputs(said: Mapping[str, Any] | None, scaled: bool) -> tuple[str, str]:
    """How inputs are rounded, see `StoredGrid.container`, and what is said where they are not as the config asks."""
    if not said:
        return "", ""
    if said.get("dtype") == "int8" and said.get("symmetric"):
        if said.get("is_dynamic") and said.get("qscheme") == "per_channel":
            return "dyn", ""
        if not said.get("is_dynamic") and said.get("qscheme") == "per_tensor" and scaled:
            return "static", ""
    return "", FLOAT_INPUTS


@dataclass(frozen=True)
class QuarkWeight(CodedWeight):
    """Integers; see the top of this file.

    Attributes:
        grid: of its codes; path: of its module; signed: codes are; grouped: they lie along the input features first.
        reorder: see `Quark`.
    """

    grid: StoredGrid
    path: str
    signed: bool
    grouped: bool
    reorder: bool

    def decode(self, read: Read) -> Given | Tensor:
        n, k = self.shape
        codes, zeros = self._raised(read(self.parts[0]), n if self.grouped else k), None
        scale = self._each(read(self.parts[1])).t().float().contiguous()
        if self._zero:
            stored = read(self._zero).reshape(self.grid.groups, -1)
            zeros = self._raised(stored, n).expand(self.grid.groups, n).t().contiguous()
        codes = codes.t().contiguous() if self.grouped else codes
        middle = 1 << (self.grid.bits - 1)
        if self.grid.symmetric and zeros is not None and bool((zeros != middle).any()):
            raise CaptureError(
                "has zero points, but the config says that all codes are symmetric", place=self._zero,
                remedy="The config does not belong to these weights",
            )  # fmt: skip
        if self.scheme is None:
            return self.grid.values(codes, scale, zeros)
        static = self.scheme.activation is not None and self.scheme.activation.kind == "static"
        given = float(read(f"{self.path}.input_scale")) if static else None
        weight = self.grid.weight(codes, scale, None if self.grid.symmetric else zeros, self.scheme)
        return Given(weight, input_scale=given)

    def formula(self, read: Read) -> Tensor:
        """Code by code, from the place of each in its word."""
        n, k = self.shape
        stored, scale = read(self.parts[0]).numpy(), self._each(read(self.parts[1])).double().numpy()
        codes = self._fields(stored, n if self.grouped else k)
        codes = codes.T if self.grouped else codes
        zero = np.zeros_like(scale, dtype=np.int64)
        if self._zero:
            zero = np.broadcast_to(self._fields(read(self._zero).numpy().reshape(self.grid.groups, -1), n), scale.shape)
        columns = [(codes[:, j] - zero[j // self.grid.group]) * scale[j // self.grid.group] for j in range(k)]
        return torch.from_numpy(np.stack(columns, axis=1))

    @property
    def _zero(self) -> str:
        return next((part for part in self.parts if part.endswith(".weight_zero_point")), "")

    def _each(self, scale: Tensor) -> Tensor:
        """[G, N], also of one for all."""
        return scale.reshape(self.grid.groups, -1).expand(-1, self.shape[0])

    def _raised(self, stored: Tensor, count: int) -> Tensor:
        """Codes [rows, count] counting from 0, uint8."""
        if self.grid.bits == 8:
            return (stored.to(torch.int16) + (128 if stored.dtype == torch.int8 else 0)).to(torch.uint8)
        codes = unpack_words(stored, 4)
        codes = (in_order(codes).t() if self.reorder else codes)[:, :count]
        return codes ^ 8 if self.signed else codes

    def _fields(self, stored: np.ndarray, count: int) -> np.ndarray:
        """Signed or unsigned codes as they are, int64 [rows, count]."""
        if self.grid.bits == 8:
            return stored.astype(np.int64)
        words, places = np.ascontiguousarray(stored).view(np.uint32), _IN_A_WORD[self.reorder]
        columns = [words[:, j // 8] >> np.uint32(4 * places.index(j % 8)) & np.uint32(15) for j in range(count)]
        codes = np.stack(columns, axis=1).astype(np.int64)
        return np.where(codes > 7, codes - 16, codes) if self.signed else codes
