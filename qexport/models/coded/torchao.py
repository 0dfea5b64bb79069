"""torchao, whose tensors of their own kinds lie in safetensors as parts, with what they are in the header of the file.

    path._weight_qdata, path._weight_scale, path._weight_zero_point, ...    for path.weight
    header: "path.weight": {"_type": ..., "_data": {"block_size": [1, group], ...}, "_tensor_data_names": [...]}

    Int8Tensor                qdata int8 [N, K], scale [N, 1], zero_point int8: 0
    IntxUnpackedToInt8Tensor  qdata int8 [N, K] of 1 to 8 bits, scale and zero_point [N, K / group]
    Int4Tensor                qdata [N, K / 2], the first of two signed codes in the low bits; scale and zero_point
                              [K / group, N]: weight = code * scale + zero_point
    Float8Tensor              qdata float8, scale [N, 1] or [1, 1] or of blocks
    MXTensor, NVFP4Tensor     see four_bit_floats.py

weight = (code - zero_point) * scale but for Int4Tensor.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
from ...quant.packing import unpack_rows
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
)
from .four_bit_floats import FourBitFloats
from .grids import FLOAT_INPUTS, StoredGrid
from .scaled_floats import FLOAT8, ScaledFloats

_SYMMETRIC = "SYMMETRIC"
_INT = re.compile(r"int(\d)$")


@coded_checkpoint
@dataclass(frozen=True)
class TorchAO(CodedCheckpoint):
    """A config's settings.

    Attributes:
        kinds: names of configs of torchao, without their endings.
        symmetric: all that say how codes lie say that they lie around 0.
    """

    title = "torchao"
    kinds: tuple[str, ...]
    symmetric: bool

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") != "torchao":
            return None
        kinds = dict.fromkeys(str(part["_type"]).removesuffix("Config") for part in _configs(said.get("quant_type")))
        mappings = set(_mappings(said.get("quant_type")))
        return cls(tuple(kinds), mappings == {_SYMMETRIC})

    @property
    def described(self) -> str:
        return f"torchao, {', '.join(self.kinds)}" if self.kinds else "torchao"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        found = []
        for name in sorted(n for n in tensors if n.endswith("._weight_qdata")):
            path = name.removesuffix("._weight_qdata")
            try:
                said = json.loads(tensors[name].metadata[f"{path}.weight"])
                kind, data = said["_type"], said["_data"]
            except (KeyError, ValueError, TypeError):
                raise CaptureError(
                    "is part of a torchao tensor that the header of its file does not describe", place=name
                ) from None  # fmt: skip
            found.append(self._at(path, name, kind, data, tensors))
        return found

    def _at(
        self, path: str, name: str, kind: str, data: Mapping[str, Any], tensors: Mapping[str, Header]
    ) -> CodedWeight:  # fmt: skip
        weight, scale = f"{path}.weight", f"{path}._weight_scale"
        own = {n for n in tensors if n.startswith(f"{path}._weight_")} - {name, scale}
        if data.get("is_swizzled_scales"):
            raise CaptureError("has its scales in the order of a GPU kernel, which is not supported", place=scale)
        if kind == "Float8Tensor" or (kind == "MXTensor" and tensors[name].dtype in FLOAT8):
            size = data.get("block_size")
            block = (1, size) if isinstance(size, int) else (size[0], size[1]) if isinstance(size, list) else None
            return ScaledFloats.at(weight, scale, tensors, block, stored=name)
        if kind in ("MXTensor", "NVFP4Tensor"):
            second = f"{path}._weight_per_tensor_scale"
            second = second if second in own else ""
            return FourBitFloats.at(weight, name, scale, tensors, second, others=tuple(sorted(own - {second})))
        if kind == "Int4Tensor":
            return self._int4(path, name, data, tensors)
        if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            raise CaptureError(f"is a torchao {kind}, which is not supported", place=name, remedy=REQUANTIZE)
        return self._integers(path, name, kind, data, tensors)

    def _integers(
        self, path: str, name: str, kind: str, data: Mapping[str, Any], tensors: Mapping[str, Header]
    ) -> "UnpackedWeight":  # fmt: skip
        of = _INT.search(str((data.get("target_dtype") or {}).get("_data", "int8")))
        block = data.get("block_size")
        if tensors[name].dtype != "I8" or len(tensors[name].shape) != 2 or of is None or not _rows(block):
            raise CaptureError(f"is a torchao {kind} in blocks of {block}, which is not supported", place=name)
        bits, (n, k), size = int(of[1]), tensors[name].shape, int(block[1])
        symmetric = kind == "Int8Tensor" or self.symmetric
        grid = StoredGrid(bits, size if size < k else k, symmetric, k)
        scale = expect(tensors, f"{path}._weight_scale", (n, grid.groups))
        zero = f"{path}._weight_zero_point"
        zeros = (expect(tensors, zero, (n, grid.groups)),) if zero in tensors else ()
        scheme, kept = grid.container("dyn" if _per_token(data) else "")
        if data.get("activation_quantization"):
            kept += FLOAT_INPUTS
        parts = (name, scale, *zeros)
        return UnpackedWeight(f"{path}.weight", (n, k), parts, scheme, kept, tensors[scale].dtype, grid)

    def _int4(self, path: str, name: str, data: Mapping[str, Any], tensors: Mapping[str, Header]) -> "Int4Weight":
        block = data.get("block_size")
        if tensors[name].dtype not in ("I8", "U8") or len(tensors[name].shape) != 2 or not _rows(block):
            raise CaptureError(f"is a torchao Int4Tensor in blocks of {block}, which is not supported", place=name)
        n, k = tensors[name].shape[0], 2 * tensors[name].shape[1]
        grid = StoredGrid(4, int(block[1]), symmetric=True, columns=k)
        scale, zero = (expect(tensors, f"{path}._weight_{part}", (grid.groups, n)) for part in ("scale", "zero_point"))
        scheme, kept = grid.container()
        if scheme is not None:
            kept += OFFSETS
        return Int4Weight(f"{path}.weight", (n, k), (name, scale, zero), scheme, kept, tensors[scale].dtype, grid)


def _configs(said: Any) -> list[Mapping[str, Any]]:
    """The configs of torchao in what a config.json says of them, whatever modules they are for."""
    if not isinstance(said, Mapping):
        return []
    own = [said] if str(said.get("_type", "")).endswith("Config") and "granularity" not in said else []
    if own and own[0]["_type"] not in ("FqnToConfig", "ModuleFqnToConfig"):
        return own
    return [config for part in said.values() for config in _configs(part)]


def _mappings(said: Any) -> list[str]:
    """How codes of weights lie, of every part of a config that says it."""
    if not isinstance(said, Mapping):
        return []
    own = [said[key] for key in ("mapping_type", "weight_mapping_type") if key in said]
    named = [str(how["_data"] if isinstance(how, Mapping) else how) for how in own]
    return named + [how for part in said.values() for how in _mappings(part)]


def _rows(block: Any) -> TypeGuard[list[int]]:
    """Whether blocks are pieces of rows."""
    return isinstance(block, list) and len(block) == 2 and block[0] == 1


def _per_token(data: Mapping[str, Any]) -> bool:
    """Whether inputs are rounded to 8 bits with a scale for each token, around 0."""
    said = (data.get("act_quant_kwargs") or {}).get("_data") or {}
    of = {key: (said.get(key) or {}).get("_data") for key in ("granularity", "mapping_type")}
    return bool(said) and of["mapping_type"] == _SYMMETRIC and of["granularity"] == {"dim": -1}


@dataclass(frozen=True)
class UnpackedWeight(CodedWeight):
    """Codes in bytes of their own; grid: of them."""

    grid: StoredGrid

    def decode(self, read: Read) -> Given | Tensor:
        middle, scale = 1 << (self.grid.bits - 1), read(self.parts[1]).float()
        codes = (read(self.parts[0]).to(torch.int16) + middle).to(torch.uint8)
        zeros = read(self.parts[2]).to(torch.int16) if len(self.parts) > 2 else torch.zeros_like(scale).to(torch.int16)
        if self.grid.symmetric and bool(zeros.any()):
            raise CaptureError(
                "has zero points, but by the config codes are symmetric around 0", place=self.parts[2],
                remedy="The config does not belong to these weights",
            )  # fmt: skip
        if self.scheme is None:
            return self.grid.values(codes, scale, zeros + middle)
        raised = None if self.grid.symmetric else (zeros + middle).to(torch.uint8)
        return Given(self.grid.weight(codes, scale, raised, self.scheme))

    def formula(self, read: Read) -> Tensor:
        """As torchao's dequantize_affine, row by row."""
        codes, scale = read(self.parts[0]).numpy().astype(np.float64), read(self.parts[1]).double().numpy()
        zero = read(self.parts[2]).numpy().astype(np.float64) if len(self.parts) > 2 else np.zeros_like(scale)
        size = self.grid.group
        rows = [(row - np.repeat(z, size)[: len(row)]) * np.repeat(s, size)[: len(row)]
                for row, z, s in zip(codes, zero, scale, strict=True)]  # fmt: skip
        return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Int4Weight(CodedWeight):
    """Signed codes, two to a byte, and float zero points; grid: of them."""

    grid: StoredGrid
    has_offset = True

    def decode(self, read: Read) -> Given | Tensor:
        packed = read(self.parts[0]).view(torch.uint8)
        raised = unpack_rows(packed, 4, self.grid.columns) ^ 8
        scale, offset = (read(part).t().contiguous() for part in self.parts[1:])
        if self.scheme is None:
            at = torch.arange(self.grid.columns) // self.grid.group
            values = (raised.double() - 8) * scale.double()[:, at] + offset.double()[:, at]
            return values.float()
        return Given(self.grid.weight(raised, scale, None, self.scheme), offset=offset.double())

    def formula(self, read: Read) -> Tensor:
        """Column by column: the even ones are in the low halves of bytes."""
        packed = read(self.parts[0]).view(torch.uint8).numpy().astype(np.int64)
        scale, zero = (read(part).double().numpy() for part in self.parts[1:])
        columns = []
        for column in range(self.grid.columns):
            code = packed[:, column // 2] >> 4 * (column % 2) & 15
            group = column // self.grid.group
            columns.append(np.where(code > 7, code - 16, code) * scale[group] + zero[group])
        return torch.from_numpy(np.stack(columns, axis=1))
