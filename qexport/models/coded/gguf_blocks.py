"""Blocks of GGUF whose codes have a scale for each group, as folders made of GGUF files hold them.

    Q4_0    32 weights: float16 d, 16 bytes of codes;                     weight = d * (code - 8)
    Q4_1    32 weights: float16 d and m, 16 bytes of codes;               weight = d * code + m
    Q5_0    32 weights: float16 d, 32 high bits, 16 bytes of codes;       weight = d * (code - 16)
    Q5_1    32 weights: float16 d and m, 32 high bits, 16 bytes of codes; weight = d * code + m
    Q8_0    32 weights: float16 d, 32 signed bytes;                       weight = d * code
    Q4_K    256 weights: float16 d and e, 6 bits s and t for every 32 in 12 bytes, 128 bytes of codes;
            weight = d * s * code - e * t
    Q5_K    the same with 256 high bits before the codes
    Q6_K    256 weights: 128 bytes of low and 64 of high bits, a signed byte s for every 16, float16 d;
            weight = d * s * (code - 32)
    Q2_K    256 weights: 4 bits s and t for every 16 in a byte, 64 bytes of codes, float16 d and e;
            weight = d * s * code - e * t
    Q3_K    256 weights: 32 bytes of high and 64 of low bits, 6 bits s for every 16 in 12 bytes, float16 d;
            weight = d * (s - 32) * (code - 4)
    TQ2_0   256 weights: 64 bytes of codes, float16 d;                    weight = d * (code - 1)
    IQ4_NL  32 weights: float16 d, 16 bytes of codes;                     weight = d * table[code]
    IQ4_XS  256 weights: float16 d, 6 bits s for every 32 in 6 bytes, 128 bytes of codes;
            weight = d * (s - 32) * table[code]
    MXFP4   32 weights: a byte e, 16 bytes of codes of 4-bit floats;      weight = 2^(e - 127) * value

The numbers of the table are whole, and twice a 4-bit float is one: they are kept in 8 bits.
A byte of the first four, of IQ4_NL, of MXFP4 and of 32 codes of IQ4_XS holds code i in its low half and code i + 16 in
its high one; of Q4_K and Q5_K, code i and code i + 32 of every 64; of 2 bits, codes i, i + 32, i + 64 and i + 96. Rows
are whole blocks one after another; a tensor `path.q4_0`, uint8 [N, bytes of a row], stands for `path.weight` [N, K]. d
* s has 19 bits at most, which float32 holds. Kernels count codes from the middle, and what that leaves of a minimum (m
or -e * t) is the offset of a group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import CaptureError
from .base import OFFSETS, CodedCheckpoint, CodedWeight, Given, Header, Read, Section, coded_checkpoint, siblings
from .four_bit_floats import TWICE
from .grids import StoredGrid

METHOD = "gguf"
_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# codes uint8 [blocks, weights], counting from 0; scales float32 [blocks, groups]; minimums float64 [blocks, groups]
Parts = tuple[Tensor, Tensor, Tensor | None]


def _q4_0(blocks: Tensor) -> Parts:
    return _halves(blocks[:, 2:]), _float16(blocks[:, :2]), None


def _q4_1(blocks: Tensor) -> Parts:
    return _halves(blocks[:, 4:]), _float16(blocks[:, :2]), _float16(blocks[:, 2:4]).double()


def _q5_0(blocks: Tensor) -> Parts:
    return _with_high(_halves(blocks[:, 6:]), blocks[:, 2:6]), _float16(blocks[:, :2]), None


def _q5_1(blocks: Tensor) -> Parts:
    codes = _with_high(_halves(blocks[:, 8:]), blocks[:, 4:8])
    return codes, _float16(blocks[:, :2]), _float16(blocks[:, 2:4]).double()


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, _float16(blocks[:, :2]), None


def _q4_k(blocks: Tensor) -> Parts:
    return (_runs(blocks[:, 16:]), *_of_runs(blocks))


def _q5_k(blocks: Tensor) -> Parts:
    high = torch.stack([(blocks[:, 16:48] >> run) & 1 for run in range(8)], 1).view(-1, 256)
    return (_runs(blocks[:, 48:]) | (high << 4), *_of_runs(blocks))


def _q6_k(blocks: Tensor) -> Parts:
    """Two halves of 128: their low bits are in 64 bytes each, their high ones in 32."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = torch.stack((low & 15, low >> 4), 2).view(-1, 256)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 256)
    return low | (high << 4), _float16(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float(), None


def _q2_k(blocks: Tensor) -> Parts:
    of_group, (d, e) = blocks[:, :16], (_float16(blocks[:, at : at + 2]) for at in (80, 82))
    return _quarters(blocks[:, 16:80]), d * (of_group & 15).float(), -e.double() * (of_group >> 4).double()


def _q3_k(blocks: Tensor) -> Parts:
    """High bits of 32 codes are bit 0 of the first 32 bytes, those of the next 32 bit 1 of them, and so on."""
    high = torch.stack([(blocks[:, :32] >> run) & 1 for run in range(8)], 1).view(-1, 256)
    low, rest = blocks[:, 96:104], blocks[:, 104:108]
    scales = torch.cat((low & 15, low >> 4), 1) | torch.cat([((rest >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], 1)
    return _quarters(blocks[:, 32:96]) | (high << 2), _float16(blocks[:, 108:]) * (scales.float() - 32), None


def _tq2_0(blocks: Tensor) -> Parts:
    codes = _quarters(blocks[:, :64])
    if bool((codes == 3).any()):
        raise CaptureError("has codes other than -1, 0 and 1", place="a block of TQ2_0")
    return codes + 1, _float16(blocks[:, 64:]), None


def _iq4_nl(blocks: Tensor) -> Parts:
    return _of_table(_halves(blocks[:, 2:]), _TABLE), _float16(blocks[:, :2]), None


def _iq4_xs(blocks: Tensor) -> Parts:
    high = torch.cat([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], 1).view(-1, 4, 2)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).view(-1, 8)
    scales = low | (high.transpose(1, 2).reshape(-1, 8) << 4)
    codes = _of_table(_halves(blocks[:, 8:].reshape(-1, 16)), _TABLE).view(-1, 256)
    return codes, _float16(blocks[:, :2]) * (scales.float() - 32), None


def _mxfp4(blocks: Tensor) -> Parts:
    scale = torch.exp2(blocks[:, :1].double() - 128).float()
    return _of_table(_halves(blocks[:, 1:]), TWICE), scale, None


def _of_table(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    """The numbers of a table, counting from -128."""
    return torch.tensor([value + 128 for value in table], dtype=torch.uint8)[codes.long()]


def _quarters(packed: Tensor) -> Tensor:
    """Four runs of 32 codes of 2 bits to 32 bytes."""
    packed = packed.reshape(-1, 2, 32)
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 256)


def _halves(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _runs(packed: Tensor) -> Tensor:
    """Two runs of 32 codes to 32 bytes."""
    packed = packed.reshape(-1, 4, 32)
    return torch.stack((packed & 15, packed >> 4), 2).view(-1, 256)


def _of_runs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of eight runs: 6 bits each, those of the last four in the high bits of what is left over."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    lows = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return _float16(blocks[:, :2]) * scales.float(), -_float16(blocks[:, 2:4]).double() * lows.double()


def _with_high(low: Tensor, bits: Tensor) -> Tensor:
    """Codes with a fifth bit: uint8 [blocks, 4] holds those of 32."""
    high = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)).view(-1, 32) & 1
    return low | (high << 4)


def _float16(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).float()


@dataclass(frozen=True)
class _Block:
    """How a type keeps its weights.

    Attributes:
        width: bytes; size: weights; bits: of a code; group: weights to a scale.
        scale_dtype: of what scales and offsets are, as safetensors calls it.
        parts: reads blocks, uint8 [blocks, width].
        minimum: groups have one.
        kept: how, where codes are numbers of a table.
    """

    width: int
    size: int
    bits: int
    group: int
    scale_dtype: str
    parts: Callable[[Tensor], Parts]
    minimum: bool = False
    kept: str = ""


_IN_8_BITS = "a table of 4 bits as integers of 8"
BLOCKS = {  # by what gguf calls a type
    "Q4_0": _Block(18, 32, 4, 32, "F16", _q4_0),
    "Q4_1": _Block(20, 32, 4, 32, "F32", _q4_1, True),
    "Q5_0": _Block(22, 32, 5, 32, "F16", _q5_0),
    "Q5_1": _Block(24, 32, 5, 32, "F32", _q5_1, True),
    "Q8_0": _Block(34, 32, 8, 32, "F16", _q8_0),
    "Q4_K": _Block(144, 256, 4, 32, "F32", _q4_k, True),
    "Q5_K": _Block(176, 256, 5, 32, "F32", _q5_k, True),
    "Q6_K": _Block(210, 256, 6, 16, "F32", _q6_k),
    "Q2_K": _Block(84, 256, 2, 16, "F32", _q2_k, True),
    "Q3_K": _Block(110, 256, 3, 16, "F32", _q3_k),
    "TQ2_0": _Block(66, 256, 2, 256, "F16", _tq2_0),
    "IQ4_NL": _Block(18, 32, 8, 32, "F16", _iq4_nl, kept=_IN_8_BITS),
    "IQ4_XS": _Block(136, 256, 8, 32, "F32", _iq4_xs, kept=_IN_8_BITS),
    "MXFP4": _Block(17, 32, 8, 32, "BF16", _mxfp4, kept=_IN_8_BITS),
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
            f"linears in {', '.join(self.others)} become float, because codes are only kept for {', '.join(BLOCKS)}",
        )  # fmt: skip

    def find(self, tensors: Mapping[str, Header], read: Read) -> list[CodedWeight]:
        return [
            _at(f"{path}.weight", name, tensors[name], kind)
            for kind in self.kept for path, name in siblings(tensors, f".{kind.lower()}")
        ]  # fmt: skip


def _at(name: str, part: str, header: Header, kind: str) -> "BlocksWeight":
    block = BLOCKS[kind]
    if header.dtype != "U8" or len(header.shape) != 2 or header.shape[1] % block.width:
        raise CaptureError(f"is not a matrix of {kind} blocks of {block.width} bytes", place=part)
    n, k = header.shape[0], header.shape[1] // block.width * block.size
    grid = StoredGrid(block.bits, block.group, symmetric=True, columns=k)
    scheme, kept = grid.container()
    if block.kept and scheme is not None:
        kept = block.kept
    if block.minimum and scheme is not None:
        kept += OFFSETS
    return BlocksWeight(name, (n, k), (part,), scheme, kept, block.scale_dtype, grid, kind)


@dataclass(frozen=True)
class BlocksWeight(CodedWeight):
    """See the top of this file.

    Attributes:
        grid: of its codes; kind: of its blocks.
    """

    grid: StoredGrid
    kind: str

    @property
    def has_offset(self) -> bool:
        return BLOCKS[self.kind].minimum

    def decode(self, read: Read) -> Given | Tensor:
        block = BLOCKS[self.kind]
        codes, scale, low = block.parts(read(self.parts[0]).reshape(-1, block.width))
        middle, n = 1 << (block.bits - 1), self.shape[0]
        codes, scale = codes.view(self.shape), scale.view(n, -1)
        offset = None if low is None else low.view(n, -1) + middle * scale.double()
        if self.scheme is None:
            values = (codes.double() - middle) * scale.double().repeat_interleave(block.group, 1)
            return (values if offset is None else values + offset.repeat_interleave(block.group, 1)).float()
        return Given(self.grid.weight(codes, scale, None, self.scheme), offset=offset)

    def formula(self, read: Read) -> Tensor:
        """As the package gguf dequantizes: its float32 has every product here, and a sum is rounded once."""
        from gguf import GGMLQuantizationType, dequantize

        values = dequantize(read(self.parts[0]).numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(values).double()
