"""Blocks of GGUF whose weights are whole numbers times a scale, as folders made of GGUF files hold them.

    Q4_0    32 weights: float16 d, 16 bytes of codes;               weight = d * (code - 8)
    Q5_0    32 weights: float16 d, 32 high bits, 16 bytes of codes; weight = d * (code - 16)
    Q8_0    32 weights: float16 d, 32 signed bytes;                 weight = d * code
    Q6_K    256 weights: 128 bytes of low and 64 of high bits, a signed byte s for every 16, float16 d;
            weight = d * s * (code - 32)

A byte of Q4_0 and Q5_0 holds code i in its low half and code i + 16 in its high one. Rows are whole blocks one after
another; a tensor `path.q4_0`, uint8 [N, bytes of a row], stands for `path.weight` [N, K]. d * s has 19 bits at most,
which float32 holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import CaptureError
from .base import CodedCheckpoint, CodedWeight, Given, Header, Read, Section, coded_checkpoint, siblings
from .grids import StoredGrid

METHOD = "gguf"

Parts = tuple[Tensor, Tensor]  # codes uint8 [blocks, weights], counting from 0; scales float32 [blocks, groups]


def _q4_0(blocks: Tensor) -> Parts:
    return _halves(blocks[:, 2:]), _float16(blocks[:, :2])


def _q5_0(blocks: Tensor) -> Parts:
    high = (blocks[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8)).view(-1, 32) & 1
    return _halves(blocks[:, 6:]) | (high << 4), _float16(blocks[:, :2])


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, _float16(blocks[:, :2])


def _q6_k(blocks: Tensor) -> Parts:
    """Two halves of 128: their low bits are in 64 bytes each, their high ones in 32."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = torch.stack((low & 15, low >> 4), 2).view(-1, 256)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 256)
    return low | (high << 4), _float16(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()


def _halves(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _float16(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).float()


@dataclass(frozen=True)
class _Block:
    """How a type keeps its weights.

    Attributes:
        width: bytes; size: weights; bits: of a code; group: weights to a scale.
        scale_dtype: of what scales are, as safetensors calls it.
        parts: reads blocks, uint8 [blocks, width].
    """

    width: int
    size: int
    bits: int
    group: int
    scale_dtype: str
    parts: Callable[[Tensor], Parts]


BLOCKS = {  # by what gguf calls a type
    "Q4_0": _Block(18, 32, 4, 32, "F16", _q4_0),
    "Q5_0": _Block(22, 32, 5, 32, "F16", _q5_0),
    "Q8_0": _Block(34, 32, 8, 32, "F16", _q8_0),
    "Q6_K": _Block(210, 256, 6, 16, "F32", _q6_k),
}


def part_of(name: str, kind: str) -> str:
    """What the blocks of a weight, of a type of BLOCKS, go by."""
    return f"{name.removesuffix('weight')}{kind.lower()}"


@coded_checkpoint
@dataclass(frozen=True)
class GGUFBlocks(CodedCheckpoint):
    """What a conversion says of a file.

    Attributes:
        kept: types of the linears that are blocks; others: types that became float.
    """

    title = "GGUF"
    kept: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def match(cls, said: Section) -> Self | None:
        kept = said.get("blocks")
        if said.get("quant_method") != METHOD or not isinstance(kept, list) or not BLOCKS.keys() >= set(kept):
            return None
        return cls(tuple(kept), tuple(said.get("float", ())))

    @property
    def described(self) -> str:
        return f"GGUF, blocks of {', '.join(self.kept)}"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.others:
            return ()
        return (
            f"linears in {', '.join(self.others)} become float: a code times a scale with a whole zero point, which "
            "kernels take, is not what such blocks are",
        )  # fmt: skip

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [
            _at(f"{path}.weight", name, tensors[name], kind)
            for kind in self.kept for path, name in siblings(tensors, f".{kind.lower()}")
        ]  # fmt: skip


def _at(name: str, part: str, header: Header, kind: str) -> "BlocksWeight":
    block = BLOCKS[kind]
    if header.dtype != "U8" or len(header.shape) != 2 or header.shape[1] % block.width:
        raise CaptureError(f"is no matrix of {kind} blocks of {block.width} bytes", place=part)
    n, k = header.shape[0], header.shape[1] // block.width * block.size
    grid = StoredGrid(block.bits, block.group, symmetric=True, columns=k)
    scheme, kept = grid.container()
    return BlocksWeight(name, (n, k), (part,), scheme, kept, block.scale_dtype, grid, kind)


@dataclass(frozen=True)
class BlocksWeight(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes; kind: of its blocks.
    """

    grid: StoredGrid
    kind: str

    def decode(self, read: Read) -> Given | Tensor:
        block = BLOCKS[self.kind]
        codes, scale = block.parts(read(self.parts[0]).reshape(-1, block.width))
        codes, scale = codes.view(self.shape), scale.view(self.shape[0], -1)
        if self.scheme is None:
            return (codes.float() - (1 << (block.bits - 1))) * scale.repeat_interleave(block.group, 1)
        return Given(self.grid.weight(codes, scale, None, self.scheme))

    def formula(self, read: Read) -> Tensor:
        """As the package gguf dequantizes; its float32 is exact, for no product here has more than 24 bits."""
        from gguf import GGMLQuantizationType, dequantize

        values = dequantize(read(self.parts[0]).numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(values).double()
