"""MXFP8: E4M3 numbers, one power of two for every 32 features (OCP Microscaling Formats 1.0)."""

import re
from dataclasses import dataclass, field

from ..grids import ActivationFormat
from .base import weight_format
from .small_floats import MicroscaledFormat


@weight_format
@dataclass(frozen=True)
class MXFP8(MicroscaledFormat):
    """`mxfp8`."""

    bits: int = field(default=8, init=False)
    group_size: int = field(default=32, init=False)
    name = stem = "mxfp8"
    examples = ("mxfp8",)

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["MXFP8", ActivationFormat | None]:
        return cls(), None

    def family(self, activation: ActivationFormat | None) -> str:
        return "w8a16"
