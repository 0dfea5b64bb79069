"""8-bit floats with one scale for each block (DeepSeek, Qwen), each output feature (FBGEMM) or each weight (ModelOpt).

    weight            float8 [N, K]
    weight_scale_inv  float [ceil(N / rows), ceil(K / columns)]; of other writers weight_scale

weight = stored value * scale: what is called the inverse is the scale itself. Inputs are rounded to 8-bit floats when
the method's own library runs such a model, and stay float here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from ...errors import CaptureError
from .base import CodedCheckpoint, CodedWeight, Header, Read, Section, beside, coded_checkpoint, siblings
from .scaled_floats import FLOAT8, ScaledFloats

_SCALES = ("weight_scale_inv", "weight_scale")
_OTHERS = ("input_scale", "input_scale_ub", "activation_scale")


@coded_checkpoint
@dataclass(frozen=True)
class FP8(CodedCheckpoint):
    """A config's settings.

    Attributes:
        block: rows and columns that share a scale; None where the config names none.
        cache_numbers: see `CodedCheckpoint`.
    """

    title = "FP8"
    block: tuple[int, int] | None
    cache_numbers: str = ""

    @classmethod
    def match(cls, said: Section) -> Self | None:
        inner = said.get("quantization")
        if isinstance(inner, dict):  # ModelOpt's own file
            return cls.match({"quant_method": "modelopt"} | inner)
        modelopt = said.get("quant_method") == "modelopt" and said.get("quant_algo") == "FP8"
        if said.get("quant_method") not in ("fp8", "fbgemm_fp8") and not modelopt:
            return None
        block = said.get("weight_block_size")
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(b > 0 for b in block)):
            raise CaptureError(f"its config asks for FP8 in blocks of {block}, which is not a block size")
        cache = "e4m3" if said.get("kv_cache_quant_algo") == "FP8" else ""
        return cls(None if block is None else (block[0], block[1]), cache)

    @property
    def described(self) -> str:
        return "FP8" if self.block is None else f"FP8 in blocks of {self.block[0]} x {self.block[1]}"

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        found: list[CodedWeight] = []
        for path, name in siblings(tensors, ".weight"):
            if tensors[name].dtype in FLOAT8 and (scales := beside(tensors, path, _SCALES)):
                others = beside(tensors, path, _OTHERS)
                found.append(ScaledFloats.at(name, scales[0], tensors, self.block, others))
        return found
