"""AutoRound (arXiv 2309.05516), which packs its codes as GPTQ or AWQ do; packing_format says which.

Names with "awq" are AWQ's layout. The others are GPTQ's: with "gptq" zero points are stored less 1, with "gptqmodel" or
neither as they are. extra_config has, by the names of linears or patterns of them, what is different there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from ...errors import CaptureError
from .awq import AWQ
from .base import CodedCheckpoint, CodedWeight, Header, Read, Section, coded_checkpoint
from .gptq import GPTQ

_PATTERN = re.compile(r"[*+?^$\[(|\\]")
_ROTATED = ("rotation_config", "hadamard_config", "transform_config")


@coded_checkpoint
@dataclass(frozen=True)
class AutoRound(CodedCheckpoint):
    """A config's settings, as those of the method whose layout it has."""

    title = "AutoRound"
    layout: GPTQ | AWQ

    @classmethod
    def match(cls, said: Section) -> Self | None:
        if said.get("quant_method") not in ("auto-round", "intel/auto-round"):
            return None
        form, kind = str(said.get("packing_format", "auto_round:auto_gptq")), said.get("data_type", "int")
        rotated = next((key for key in _ROTATED if said.get(key)), None)
        inputs = said.get("act_bits") or 16
        if kind != "int" or inputs < 16 or rotated or not form.startswith("auto_round") or "fp" in form:
            what = f"with {rotated}" if rotated else f"of {kind} with {inputs}-bit inputs in the layout {form}"
            raise CaptureError(f"its AutoRound codes are {what}; only integers with float inputs are supported")
        sizes = {key: said[key] for key in ("bits", "group_size", "sym") if key in said}
        layout: GPTQ | AWQ | None
        if "awq" in form:
            layout = AWQ.match({"quant_method": "awq", **sizes})
        else:
            version = "gptq" if "gptq" in form and "gptqmodel" not in form else "gptq_v2"
            others = {_pattern(name): changes for name, changes in (said.get("extra_config") or {}).items()}
            layout = GPTQ.match({"quant_method": "gptq", "checkpoint_format": version, "dynamic": others, **sizes})
        return None if layout is None else cls(layout)

    @property
    def described(self) -> str:
        return self.layout.described.replace(self.layout.title, self.title, 1)

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return self.layout.find(tensors, read)


def _pattern(name: str) -> str:
    """A key of extra_config as a pattern: one without signs of a pattern is a name."""
    return name if _PATTERN.search(name) else f"{re.escape(name)}$"
