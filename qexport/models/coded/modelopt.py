"""ModelOpt of NVIDIA: 4-bit floats, and integers whose inputs are multiplied by factors first.

    NVFP4                weight uint8 [N, K / 2], weight_scale float8 [N, K / 16], weight_scale_2 float32 []
    MXFP4                weight uint8 [N, K / 2], weight_scale uint8 [N, K / 32]
    W4A16_AWQ            weight uint8 [N / 2, K], rows 2 i and 2 i + 1 in the low and high halves, signed; weight_scale
                         [N, K / group]
    W8A8_SQ              weight int8 [N, K], weight_scale [N]
    pre_quant_scale      float [K], of some linears: what their inputs are multiplied by

Its 8-bit floats are read as those of others, and so are mixtures of all these, by linear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CaptureError
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
from .four_bit_floats import FourBitFloats
from .grids import FLOAT_INPUTS, StoredGrid
from .scaled_floats import FLOAT8, ScaledFloats

_INPUTS = ("input_scale",)
_FACTOR = "pre_quant_scale"
_FORMS = (
    "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP4", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION",
)  # fmt: skip


@coded_checkpoint
@dataclass(frozen=True)
class ModelOpt(CodedCheckpoint):
    """A config's settings; what is of 8-bit floats alone is read by `fp8.FP8`.

    Attributes:
        form: in its words; cache_numbers: see `CodedCheckpoint`.
    """

    title = "ModelOpt"
    form: str
    cache_numbers: str = ""

    @classmethod
    def match(cls, said: Section) -> Self | None:
        inner = said.get("quantization")
        if isinstance(inner, dict):  # its own file
            return cls.match({"quant_method": "modelopt"} | inner)
        form = str(said.get("quant_algo", "")).upper()
        if said.get("quant_method") not in ("modelopt", "modelopt_fp4") or form not in _FORMS:
            return None
        return cls(form, "e4m3" if said.get("kv_cache_quant_algo") == "FP8" else "")

    @property
    def described(self) -> str:
        return f"ModelOpt, {self.form}"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [
            self._at(path, scale, tensors)
            for path, scale in siblings(tensors, ".weight_scale") if f"{path}.weight" in tensors
        ]  # fmt: skip

    def _at(self, path: str, scale: str, tensors: Mapping[str, Header]) -> CodedWeight:
        name, second = f"{path}.weight", f"{path}.weight_scale_2"
        header, factor = tensors[name], f"{path}.{_FACTOR}"
        second, others = second if second in tensors else "", beside(tensors, path, _INPUTS)
        if header.dtype in FLOAT8 and factor not in tensors:
            return ScaledFloats.at(name, scale, tensors, None, others)
        whole = tensors[scale].shape[:1] == header.shape[:1]  # a row of scales for every row of bytes
        if header.dtype == "U8" and whole and factor not in tensors:
            return FourBitFloats.at(
                name, name, scale, tensors, second, others=others, note=FLOAT_INPUTS * bool(others)
            )  # fmt: skip
        if header.dtype not in ("U8", "I8") or len(header.shape) != 2 or whole != (header.dtype == "I8"):
            raise CaptureError(f"is in a form of {self.form} that is not supported", place=name, remedy=REQUANTIZE)
        return self._integers(path, scale, others, tensors)

    def _integers(
        self, path: str, scale: str, others: tuple[str, ...], tensors: Mapping[str, Header]
    ) -> "FactoredWeight":  # fmt: skip
        name, factor = f"{path}.weight", f"{path}.{_FACTOR}"
        bits = 4 if tensors[name].dtype == "U8" else 8
        rows, k = tensors[name].shape
        n, of_scale = rows * 8 // bits, tensors[scale].shape
        groups = of_scale[1] if len(of_scale) == 2 else 1
        if of_scale not in ((n,), (n, groups)) or k % groups:
            raise CaptureError(f"has shape {list(of_scale)}, which does not fit a weight of {n} x {k}", place=scale)
        grid = StoredGrid(bits, k // groups, symmetric=True, columns=k)
        static = bits == 8 and bool(others)
        scheme, kept = grid.container("static" if static else "")
        if factor in tensors:
            expect(tensors, factor, (k,))
            kept += ", and its input multiplied by the factors of the checkpoint" if scheme is not None else ""
        parts = (name, scale, *((factor,) if factor in tensors else ()), *others)
        kept += FLOAT_INPUTS if others and not static and scheme is not None else ""
        return FactoredWeight(name, (n, k), parts, scheme, kept, tensors[scale].dtype, grid)


@dataclass(frozen=True)
class FactoredWeight(CodedWeight):
    """Integers; see the top of this file. grid: of its codes."""

    grid: StoredGrid

    def decode(self, read: Read) -> Given | Tensor:
        stored, scale = read(self.parts[0]), self._scale(read).float()
        if self.grid.bits == 4:
            codes = torch.stack((stored & 15, stored >> 4), 1).view(self.shape) ^ 8
        else:
            codes = (stored.to(torch.int16) + 128).to(torch.uint8)
        factor = read(self._factor).float() if self._factor else None
        if self.scheme is None:
            values = self.grid.values(codes, scale)
            return values if factor is None else values * factor
        static = self.scheme.activation is not None
        given = float(read(next(part for part in self.parts if part.endswith(_INPUTS)))) if static else None
        return Given(self.grid.weight(codes, scale, None, self.scheme), input_scale=given, factor=factor)

    def formula(self, read: Read) -> Tensor:
        """Row by row."""
        stored, scale = read(self.parts[0]).numpy(), self._scale(read).numpy()
        factor = read(self._factor).double().numpy() if self._factor else 1.0
        rows = []
        for row in range(self.shape[0]):
            code = stored[row].astype(np.int64) if self.grid.bits == 8 else stored[row // 2].astype(np.int64)
            if self.grid.bits == 4:
                code = code >> 4 * (row % 2) & 15
                code = np.where(code > 7, code - 16, code)
            rows.append(code * np.repeat(scale[row], self.grid.group) * factor)
        return torch.from_numpy(np.stack(rows))

    @property
    def _factor(self) -> str:
        return next((part for part in self.parts if part.endswith(_FACTOR)), "")

    def _scale(self, read: Read) -> Tensor:
        """[N, groups], float64."""
        return read(self.parts[1]).double().reshape(self.shape[0], self.grid.groups)
