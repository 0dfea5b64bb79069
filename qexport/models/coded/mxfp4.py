"""MXFP4 (OCP Microscaling Formats) as gpt-oss has its experts: all of a layer in one tensor.

    path_blocks  uint8 [experts, N, K / 32, 16]   two codes to a byte, see four_bit_floats.py
    path_scales  uint8 [experts, N, K / 32]

They stand for path [experts, K, N]: the product of an expert is x path[e].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from ...errors import CaptureError
from .base import CodedCheckpoint, CodedStack, CodedWeight, Header, Read, Section, coded_checkpoint, expect
from .four_bit_floats import FourBitFloats

_GROUP = 32


@coded_checkpoint
@dataclass(frozen=True)
class MXFP4(CodedCheckpoint):
    """Experts in 4-bit floats; a config says nothing else of them."""

    title = "MXFP4"

    @classmethod
    def match(cls, said: Section) -> Self | None:
        return cls() if said.get("quant_method") == "mxfp4" else None

    @property
    def described(self) -> str:
        return f"MXFP4, experts of 4-bit floats in groups of {_GROUP}"

    def find(self, tensors: Mapping[str, Header], read: Read) -> Sequence[CodedWeight | CodedStack]:
        ending = "_blocks"
        return [_at(name.removesuffix(ending), name, tensors) for name in sorted(tensors) if name.endswith(ending)]


def _at(path: str, blocks: str, tensors: Mapping[str, Header]) -> CodedStack:
    shape = tensors[blocks].shape
    if len(shape) != 4 or shape[3] * 2 != _GROUP:
        raise CaptureError("is not a tensor of experts in blocks of 32 4-bit floats", place=blocks)
    count, n, groups, _ = shape
    scales = expect(tensors, f"{path}_scales", (count, n, groups))
    one = {
        blocks: Header(tensors[blocks].dtype, (n, groups * _GROUP // 2)),
        scales: Header(tensors[scales].dtype, (n, groups)),
    }
    each = FourBitFloats.at(path, blocks, scales, one)
    return CodedStack(path, (count, groups * _GROUP, n), (blocks, scales), each)
