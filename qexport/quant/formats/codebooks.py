"""NF4 and FP4 weights (QLoRA, arXiv 2305.14314): blocks scaled to [-1, 1] and rounded to a table of 16 values."""

import re
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..affine import row_slices
from ..grids import ActivationFormat
from ..packing import stored_block
from .base import QuantizedWeight, group_size, weight_format
from .stepped import ScaledFormat, nonzero

LARGEST = 127  # what 1 is, where the values of a table are integers of 8 bits
_NESTED_BLOCK = 256
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CodebookFormat(ScaledFormat):
    """`NAME[_g{16..1024}][_dq|_s8]`: a table's value times the largest magnitude of a block.

    Attributes:
        double_quant: the scales are themselves rounded to 8 bits (arXiv 2305.14314), and floats in the file.
        coarse_scales: scales are numbers of 8 bits in the file too, see `quant.coarse_scales`.
        name: of the table, and what names of the format begin with.
        levels: the table by code, in [-1, 1].
        kernel_code: what MatMulBnb4 calls the table.
    """

    bits: int = field(default=4, init=False)
    group_size: int = 64
    double_quant: bool = False
    coarse_scales: bool = False
    options = r"(?:_g(?P<group>\d+))?(?P<scales>_dq|_s8)?"
    name: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]
    kernel_code: ClassVar[int]

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple[Self, ActivationFormat | None]:
        return cls(group_size(match, match["group"] or "64"), match["scales"] == "_dq", match["scales"] == "_s8"), None

    @abstractmethod
    def nearest(self, steps: Tensor) -> Tensor:
        """In the middle between two values the lower one is taken, as in bitsandbytes."""

    @classmethod
    def table(cls) -> Tensor:
        """The values in the order of their codes, float32 [16]."""
        return torch.tensor(cls.levels, dtype=torch.float32)

    @classmethod
    def integers(cls) -> Tensor:
        """The values as integers of 8 bits, `LARGEST` for 1: int16 [16]."""
        return torch.round(cls.table() * LARGEST).to(torch.int16)

    def values(self, codes: Tensor) -> Tensor:
        return self.table().to(codes.device)[codes.int()]

    def scales_for(self, absmax: Tensor) -> Tensor:
        """The largest magnitude of each block, 1 where that is zero or subnormal."""
        if self.double_quant:
            return double_quantized(absmax).masked_fill(absmax < _TINY, 1)
        return self.kept_scale(nonzero(absmax))

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return decode_codebook(codes, scale, self.name, self.group_size)

    def round_to_nearest(self, w: Tensor, clip_search: bool = False) -> QuantizedWeight:
        """With double_quant the codes are still those of the exact scale, as in bitsandbytes; the scale is rounded."""
        if clip_search or not self.double_quant:
            return super().round_to_nearest(w, clip_search)
        absmax = self.absmax(w)
        return QuantizedWeight(self.encode(w, nonzero(absmax), None), self.scales_for(absmax), None, self)

    @property
    def has_coarse_scales(self) -> bool:
        return self.coarse_scales

    def family(self, activation: ActivationFormat | None) -> str:
        return self.name

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        (n, k), block = shape, stored_block(self.bits, self.group_size)
        return n * k // 2 + n * (k // block + 1 if self.coarse_scales else k // block * scale_bytes)

    @property
    def interchangeable(self) -> bool:
        return True


# The values of both are those of bitsandbytes and of ONNX Runtime's MatMulBnb4.
@weight_format
@dataclass(frozen=True)
class NF4(CodebookFormat):
    """4-bit NormalFloat: quantiles of a normal distribution, in rising order."""

    name = stem = "nf4"
    kernel_code = 1
    examples = ("nf4",)
    levels = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip

    def nearest(self, steps: Tensor) -> Tensor:
        middles = _middles(self.table().to(steps.device))
        return torch.bucketize(steps.contiguous(), middles, out_int32=True).to(torch.uint8)


@weight_format
@dataclass(frozen=True)
class FP4(CodebookFormat):
    """4-bit floating point: a sign, two bits of exponent and one of mantissa, divided by 12, the largest of them."""

    name = stem = "fp4"
    kernel_code = 0
    examples = ("fp4",)
    levels = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))

    def nearest(self, steps: Tensor) -> Tensor:
        """By magnitude, so that ties are symmetric: the one nearer to zero; the upper half of the codes has the sign.

        Zero is always code 0.
        """
        steps = steps.contiguous()
        ordered, order = self.table().to(steps.device)[:8].sort()
        codes = order.to(torch.uint8)[torch.bucketize(steps.abs(), _middles(ordered), out_int32=True)]
        return torch.where((steps < 0) & (codes > 0), codes + 8, codes)


CODEBOOKS: dict[str, type[CodebookFormat]] = {book.name: book for book in (NF4, FP4)}


def decode_codebook(
    codes: Tensor, scale: Tensor, codebook: str, block_size: int, as_integers: bool = False
) -> Tensor:
    """table[code] * scale.

    Args:
        codes: uint8 [N, K].
        scale: floating point [N, K / block_size].
        codebook: name of the table.
        as_integers: with the table in 8 bits.
    Returns:
        [N, K] of scale's dtype.
    """
    n, k = codes.shape
    book = CODEBOOKS[codebook]
    values = (book.integers() / LARGEST if as_integers else book.table()).to(codes.device, scale.dtype)
    out = torch.empty(n, k // block_size, block_size, dtype=scale.dtype, device=codes.device)
    for rows in row_slices(n, k):
        picked = values.index_select(0, codes[rows].reshape(-1).int())
        torch.mul(picked.view(-1, k // block_size, block_size), scale[rows, :, None], out=out[rows])
    return out.view(n, k)


def double_quantized(absmax: Tensor) -> Tensor:
    """Scales as they come back from 8 bits each: their mean taken off, then the nearest value of the dynamic map.

    Runs of 256 scales, in the order of the flattened weight, share a float32 scale of their own; the last may be
    shorter. What comes back is at least the smallest normal float32: bitsandbytes can give a negative scale here.

    Args:
        absmax: float32 [N, G], not negative.
    Returns:
        float32 [N, G].
    """
    mean = absmax.double().mean().float()
    centred = (absmax - mean).reshape(-1)
    runs = torch.nn.functional.pad(centred, (0, -centred.numel() % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    steps = runs.abs().amax(-1, keepdim=True)
    steps = steps.masked_fill(steps < _TINY, 1)
    values = dynamic_map().to(absmax.device)
    codes = torch.bucketize(runs / steps, _middles(values))
    return (values[codes] * steps + mean).view(-1)[: absmax.numel()].view(absmax.shape).clamp_min(_TINY)


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map (arXiv 2110.02861), float32 [256], rising.

    The decade below 10^-e, e = 0 .. 6, has 2^(6-e) values of each sign, the middles of as many equal parts of [0.1, 1]
    times 10^-e; the two codes left over are 0 and 1.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1, dtype=torch.float32)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    values = torch.cat(positive)
    return torch.cat([-values, values, values.new_tensor([0, 1])]).sort().values


def _middles(ordered: Tensor) -> Tensor:
    """The largest float32 numbers not above the middles: a float32 number above one of them is above the other too."""
    exact = (ordered[1:].double() + ordered[:-1].double()) / 2
    rounded = exact.float()
    return torch.where(rounded.double() > exact, rounded.nextafter(torch.full_like(rounded, -torch.inf)), rounded)
