"""compressed-tensors, as llm-compressor writes them: every linear has the settings of a group of the config.

pack-quantized: integers of 1 to 8 bits, plus half their range so that none is negative, as one stream of bits a row
    weight_packed      int32 [N, K * bits / 32]    along the input features, the first in the lowest bits
    weight_scale       float [N, G]                [N, 1] for one scale for each output feature
    weight_zero_point  int32 [N * bits / 32, G]    along the output features; where the grid is not symmetric
    weight_shape       int64 [2]
    weight_g_idx       int32 [K]                   the group of each input feature, as old versions wrote it
int-quantized, naive-quantized: weight int8 [N, K], weight_scale, and weight_zero_point int8 shaped like it
float-quantized: weight float8 [N, K], weight_scale [1], [N, 1], or one for each block
nvfp4-pack-quantized, mxfp4-pack-quantized: weight_packed uint8, see four_bit_floats.py; weight_global_scale float [1],
by which the scales of the former are divided

weight = (code - zero point) * scale
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

_DENSE = ("dense", None)


@coded_checkpoint
@dataclass(frozen=True)
class CompressedTensors(CodedCheckpoint):
    """A config's settings.

    Attributes:
        groups: of linears: their targets, and what is said of their weights and inputs.
        form: of most of them, in the config's words.
        cache: what it says of how keys and values are quantized.
    """

    title = "compressed-tensors"
    groups: tuple[Mapping[str, Any], ...]
    form: str
    cache: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") not in ("compressed-tensors", None) or "config_groups" not in said:
            return None
        sparse = said.get("sparsity_config") or {}
        other = (
            "a transform" if said.get("transform_config")
            else f"sparse tensors ({sparse.get('format')})" if sparse.get("format") not in _DENSE
            else "a scheme by its name" if any(not isinstance(g, dict) for g in said["config_groups"].values())
            else ""
        )  # fmt: skip
        if other:
            raise CaptureError(f"its compressed-tensors config asks for {other}, which is not supported")
        return cls(
            tuple(said["config_groups"].values()), str(said.get("format", "")), said.get("kv_cache_scheme") or {}
        )

    @property
    def described(self) -> str:
        sizes = ", ".join(dict.fromkeys(_in_words(group) for group in self.groups))
        return f"compressed-tensors, {self.form}: {sizes}" if self.form else f"compressed-tensors: {sizes}"

    @property
    def cache_numbers(self) -> str:
        said = self.cache
        plain = said.get("strategy", "tensor") == "tensor" and not said.get("dynamic") and said.get("symmetric", True)
        if not said or said.get("num_bits", 8) != 8 or not plain:
            return ""
        return "e4m3" if said.get("type") == "float" else "int"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.cache or self.cache_numbers:
            return ()
        return (CACHE_LEFT_OUT,)

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        found: list[CodedWeight] = [
            self._packed(path, name, tensors, read) for path, name in siblings(tensors, ".weight_packed")
        ]
        for path, name in siblings(tensors, ".weight"):
            if f"{path}.weight_scale" in tensors:
                dtype = tensors[name].dtype
                found.append(self._floats(path, name, tensors) if dtype in FLOAT8 else self._plain(path, name, tensors))
        return found

    def _packed(self, path: str, name: str, tensors: Mapping[str, Header], read: Read) -> CodedWeight:
        group = self._group(path)
        if group["weights"].get("type") == "float" and tensors[name].dtype == "U8":
            return self._four_bit_floats(path, name, group, tensors)
        bits = group["weights"].get("num_bits", 8)
        if tensors[name].dtype != "I32" or group["weights"].get("type", "int") != "int" or bits not in range(2, 9):
            raise CaptureError(
                f"is not a matrix of int32 words that hold {bits}-bit integers", place=name, remedy=REQUANTIZE
            )
        n, k = (int(size) for size in read(expect(tensors, f"{path}.weight_shape", (2,))))
        expect(tensors, name, (n, -(-k * bits // 32)))
        more = (f"{path}.weight_shape", *((f"{path}.weight_g_idx",) if f"{path}.weight_g_idx" in tensors else ()))
        return self._integer(path, name, (n, k), bits, group, tensors, more)

    def _plain(self, path: str, name: str, tensors: Mapping[str, Header]) -> "IntegerWeight":
        group, header = self._group(path), tensors[name]
        bits = group["weights"].get("num_bits", 8)
        if header.dtype != "I8" or len(header.shape) != 2 or bits not in range(2, 9):
            raise CaptureError(f"is not a matrix of int8 codes of {bits} bits", place=name, remedy=REQUANTIZE)
        n, k = header.shape
        return self._integer(path, name, (n, k), bits, group, tensors, ())

    def _integer(
        self, path: str, name: str, shape: tuple[int, int], bits: int, group: Mapping[str, Any],
        tensors: Mapping[str, Header], more: tuple[str, ...],
    ) -> "IntegerWeight":  # fmt: skip
        (n, k), said = shape, group["weights"]
        scale = f"{path}.weight_scale"
        present(tensors, scale)
        block = said.get("block_structure") if said.get("strategy") == "block" else None
        high, size = block or (1, said.get("group_size") or -1)
        grid = StoredGrid(bits, size if 0 < size < k else k, bool(said.get("symmetric", True)), k)
        one = tensors[scale].shape in ((1,), (1, 1), ()) and grid.groups == 1
        if not one:
            expect(tensors, scale, (-(-n // high), grid.groups))
        zero: tuple[str, ...] = ()
        if not grid.symmetric:
            rows = -(-n * bits // 32) if name.endswith("_packed") else -(-n // high)
            if high > 1 and name.endswith("_packed"):
                raise CaptureError("has packed zero points for blocks, which are not supported", place=name)
            zero = (f"{path}.weight_zero_point",)
            if not one:
                expect(tensors, zero[0], (rows, grid.groups))
        inputs, dropped = _inputs(group, f"{path}.input_scale" in tensors)
        scheme, kept = grid.container(inputs)
        spare = beside(tensors, path, _UNREAD)
        kept += dropped
        if f"{path}.weight_g_idx" in more and scheme is not None and grid.groups > 1:
            kept += ", input features in the order of their groups"
        return IntegerWeight(
            f"{path}.weight", shape, (name, scale, *zero, *more, *spare), scheme, kept, tensors[scale].dtype, grid,
            path, high,
        )  # fmt: skip

    def _floats(self, path: str, name: str, tensors: Mapping[str, Header]) -> ScaledFloats:
        group = self._group(path)
        block = group["weights"].get("block_structure")
        spare = beside(tensors, path, _UNREAD)
        return ScaledFloats.at(name, f"{path}.weight_scale", tensors, tuple(block) if block else None, spare)

    def _four_bit_floats(
        self, path: str, name: str, group: Mapping[str, Any], tensors: Mapping[str, Header]
    ) -> FourBitFloats:  # fmt: skip
        scale, second = f"{path}.weight_scale", f"{path}.weight_global_scale"
        others = beside(tensors, path, ("input_global_scale", "weight_shape", *_UNREAD))
        return FourBitFloats.at(
            f"{path}.weight", name, present(tensors, scale), tensors, second if second in tensors else "",
            divides=True, others=others, note=FLOAT_INPUTS if group.get("input_activations") else "",
        )  # fmt: skip

    def _group(self, path: str) -> Mapping[str, Any]:
        """The settings of a module: by its own name, else by a pattern, else by its class.

        Raises:
            CaptureError: no group has a linear of this name.
        """
        by_class = None
        for group in self.groups:
            for target in sorted(group.get("targets") or ("Linear",), key=lambda t: t.startswith("re:")):
                if target == path or (target.startswith("re:") and re.match(target[3:], path)):
                    return group
                if target == "Linear":
                    by_class = by_class or group
        if by_class is None or not isinstance(by_class.get("weights"), dict):
            raise CaptureError("is quantized, but no group in the config says how", place=f"{path}.weight")
        return by_class


# Beside a weight, and without a meaning for what is exported, or read with the weight.
_UNREAD = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def _in_words(group: Mapping[str, Any]) -> str:
    said, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    kind, size = "float" if said.get("type") == "float" else "int", said.get("group_size")
    groups = f" in groups of {size}" if isinstance(size, int) and size > 0 else f" by {said.get('strategy', 'tensor')}"
    how = "dynamic" if inputs.get("dynamic") else "static"
    of_inputs = f" with {how} {inputs.get('type', 'int')}{inputs.get('num_bits', 8)} inputs" if inputs else ""
    return f"{kind}{said.get('num_bits', 8)}{groups}{of_inputs}"


def _inputs(group: Mapping[str, Any], scaled: bool) -> tuple[str, str]:
    """How inputs are rounded, see `StoredGrid.container`, and what is said where they are not, though the config asks.

    Args:
        scaled: whether there is a scale for them.
    """
    said = group.get("input_activations")
    if not said:
        return "", ""
    if said.get("type", "int") != "int" or said.get("num_bits", 8) != 8 or not said.get("symmetric", True):
        return "", FLOAT_INPUTS
    if said.get("dynamic"):
        return "dyn", ""
    return ("static", "") if scaled else ("", ", but inputs stay float: there is no scale for them")


@dataclass(frozen=True)
class IntegerWeight(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes.
        path: of its module.
        high: rows that share scales.
    """

    grid: StoredGrid
    path: str
    high: int = 1

    def decode(self, read: Read) -> Given | Tensor:
        bits, (n, k) = self.grid.bits, self.shape
        stored, scale = read(self.parts[0]), self._scale(read).float()
        codes = _unpacked(stored, bits, k) if self._packed else _raised(stored, bits)
        zeros = None
        if not self.grid.symmetric:
            at = read(f"{self.path}.weight_zero_point")
            packed = _unpacked(at.t().contiguous(), bits, n).t() if self._packed else None
            zeros = self._rows(_raised(at.reshape(-1, self.grid.groups), bits) if packed is None else packed)
            zeros = zeros.contiguous()
        order = None
        if (of_group := f"{self.path}.weight_g_idx") in self.parts:
            order = self.grid.order(read(of_group).long(), of_group)
            codes = codes if order is None else codes[:, order.features]
        if self.scheme is None:
            values = self.grid.values(codes, scale, zeros)
            return values if order is None else order.undo(values)
        static = self.scheme.activation is not None and self.scheme.activation.kind == "static"
        given = float(read(f"{self.path}.input_scale")) if static else None
        return Given(self.grid.weight(codes, scale, zeros, self.scheme), order, given)

    def formula(self, read: Read) -> Tensor:
        """Code by code: bit i of code j is bit j * bits + i of its row."""
        bits, (n, k) = self.grid.bits, self.shape
        stored = read(self.parts[0]).numpy()
        code = _fields(stored, bits, k) - (1 << (bits - 1)) if self._packed else stored.astype(np.int64)
        group = np.arange(k) // self.grid.group
        if (of_group := f"{self.path}.weight_g_idx") in self.parts:
            group = read(of_group).numpy()
        zero: Any = 0
        if not self.grid.symmetric:
            at = read(f"{self.path}.weight_zero_point").numpy()
            zero = _fields(at.T, bits, n).T - (1 << (bits - 1)) if self._packed else at.astype(np.int64)
            zero = zero if self._packed else zero.reshape(-1, self.grid.groups)
            zero = np.repeat(zero, self.high, axis=0)[:n]
            zero = zero[:, group] if zero.shape[1] > 1 else zero
        scale = self._scale(read).double().numpy()
        return torch.from_numpy((code - zero) * scale[:, group])

    @property
    def _packed(self) -> bool:
        return self.parts[0].endswith("_packed")

    def _scale(self, read: Read) -> Tensor:
        return self._rows(read(self.parts[1]).reshape(-1, self.grid.groups))

    def _rows(self, stored: Tensor) -> Tensor:
        """[N, G], also of one for all or for some rows."""
        return stored.repeat_interleave(self.high, 0)[: self.shape[0]].expand(self.shape[0], -1)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of rows of words, whose last ones may be cut off: uint8 [rows, count]."""
    missing = -words.shape[1] % bits
    return unpack_words(torch.nn.functional.pad(words, (0, missing)), bits)[:, :count].contiguous()


def _raised(codes: Tensor, bits: int) -> Tensor:
    """Signed codes counting from 0, uint8."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [rows, count]."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    places = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return (places << np.arange(bits)).sum(-1)
