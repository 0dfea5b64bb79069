"""Grids of integers: w2 to w8, symmetric or with zero points, in groups, by channel or by tensor."""

import re
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import RecipeError
from ..affine import decode, encode, search_clip, weight_scales
from ..grids import PER_CHANNEL, PER_TENSOR, ActivationFormat, AffineGrid
from ..packing import stored_block
from ..strips import Levels
from .base import WeightFormat, group_size, weight_format
from .stepped import SteppedFormat


@dataclass(frozen=True)
class IntegerCodes(AffineGrid, SteppedFormat, ABC):
    """Values (code - zero_point) * scale, in whole bits a code."""

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return encode(w, scale, zero_point, self)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return decode(codes, scale, zero_point, self)

    def levels(self) -> Levels | Sequence[Levels] | None:
        """The values of codes in steps, of all groups or of each; None where these are all integers of a range."""
        return None

    @property
    def stored_bits(self) -> int:
        """The next that a kernel reads: 2, 4 or 8."""
        return next(bits for bits in (2, 4, 8) if bits >= self.bits)

    @property
    def in_planes(self) -> bool:
        return self.group_size > 0 and self.bits < self.stored_bits

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        if self.group_size > 0:
            return self._bytes_of_blocks(shape, scale_bytes)
        (n, k), bits = shape, self.stored_bits
        rows = 1 if self.group_size == PER_TENSOR else n
        zero_points = 0 if self.symmetric else -(-rows * bits // 8)
        return n * k * bits // 8 + rows * scale_bytes + zero_points

    def _bytes_of_blocks(self, shape: tuple[int, int], scale_bytes: int) -> int:
        """As the kernel for groups has them: a shorter last block takes the place of a whole one."""
        (n, k), bits = shape, self.stored_bits
        block = stored_block(bits, self.group_size)
        blocks = -(-k // block)
        zero_points = 0 if self.symmetric else -(-blocks * bits // 8)  # every row begins on a byte of its own
        codes = blocks * block * (self.bits if self.in_planes else bits) // 8
        return n * (codes + self._bytes_of_scales(blocks, scale_bytes) + zero_points)

    def _bytes_of_scales(self, blocks: int, scale_bytes: int) -> int:
        """Of a row."""
        return blocks * scale_bytes

    def takes_part_group(self, in_features: int) -> bool:
        """ONNX's DequantizeLinear and the kernel it fuses to allow it, unless the kernel takes no blocks so long."""
        if self.stored_bits == 2:
            return False
        return in_features > self.group_size == stored_block(self.stored_bits, self.group_size)

    @property
    def has_zero_points(self) -> bool:
        return not self.symmetric

    @property
    def rows_readable(self) -> bool:
        return self.group_size > 0

    @property
    def interchangeable(self) -> bool:
        return self.group_size > 0


@weight_format
@dataclass(frozen=True)
class IntegerFormat(IntegerCodes):
    """`w{2|3|4|5|6|8}a{16|8|4}[_g{16..1024}|_pc|_pt][_asym][_s8][_dyn|_static][_int]`: (code - zero_point) * scale.

    Integer activations need `_dyn` (per token) or `_static` (per tensor); `_dyn` is what plain `w4a8` means. Without a
    group, weights have one scale per output channel. `_s8` keeps the scales of groups in 8 bits, see `coarse_scales`.
    `_int` is an `ExpandedFormat`.

    Attributes:
        coarse_scales: scales are numbers of 8 bits, which become floats when the file is loaded.
    """

    coarse_scales: bool = False

    stem = r"w(?P<w>\d+)a(?P<a>\d+)"
    options = r"(?:_(?P<group>g\d+|pc|pt))?(?P<asym>_asym)?(?P<scales>_s8)?(?:_(?P<kind>dyn|static))?(?P<int>_int)?"
    examples = ("w4a16_g32", "w4a16_g128_asym", "w4a16_g32_s8", "w3a16_g64", "w6a16_g32_s8", "w8a8_dyn",
                "w8a8_static", "w4a8_g128_int")  # fmt: skip
    # A weight-only scheme without a group is what other tools mean by it: groups, because one scale per channel is too
    # coarse for 4 bits and saves nothing in speed at 8. `_pc` asks for one scale per channel.
    short = {
        "w2a16": "w2a16_g64",
        "w4a16": "w4a16_g128",
        "w4a16_asym": "w4a16_g128_asym",
        "w8a16": "w8a16_g32",
        "w8a16_asym": "w8a16_g32_asym",
        "w8a8": "w8a8_dyn",
    }

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple[WeightFormat, ActivationFormat | None]:
        name, bits, act, group = match.string, int(match["w"]), int(match["a"]), match["group"]
        if bits not in (2, 3, 4, 5, 6, 8) or act not in (4, 8, 16):
            raise RecipeError(
                f"scheme {name!r} asks for {bits}-bit weights and {act}-bit activations",
                remedy=f"Schemes are {', '.join(cls.examples)} and the like",
            )
        size = {None: PER_CHANNEL, "pc": PER_CHANNEL, "pt": PER_TENSOR}.get(group)
        if size is None:
            size = group_size(match, group[1:])
        if act == 16 and (match["kind"] or match["int"]):
            what = match["kind"] or "int"
            raise RecipeError(f"scheme {name!r} quantizes no activations, so {what.strip('_')} has no meaning")
        kind = {"dyn": "dynamic", "static": "static", None: "dynamic"}[match["kind"]]
        activation = None if act == 16 else ActivationFormat(kind, act)
        kind_of_weight = ExpandedFormat if match["int"] else IntegerFormat
        weight = kind_of_weight(bits, size, match["asym"] is None, match["scales"] is not None)
        _check(name, weight, activation)
        return weight, activation

    def scales(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight_scales(w, self)

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return search_clip(w, self, importance)

    @property
    def has_coarse_scales(self) -> bool:
        return self.coarse_scales

    def _bytes_of_scales(self, blocks: int, scale_bytes: int) -> int:
        return blocks + 1 if self.coarse_scales else blocks * scale_bytes

    def family(self, activation: ActivationFormat | None) -> str:
        if activation is None:
            return "w8a16" if self.bits == 8 else "w4a16_g128"
        if self.bits == 8:
            return "w8a8_static" if activation.kind == "static" else "w8a8_dyn"
        return "w4a8_g128" if self.group_size > 0 else "w4a8"


@dataclass(frozen=True)
class ExpandedFormat(IntegerFormat):
    """Groups of few bits in the file, int8 with one scale per output channel when it is loaded (`_int`).

    So the product with integer activations is one integer matmul.
    """

    def multiplied(self, values: Tensor) -> Tensor:
        return IntegerFormat(8).rounded(values)

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        (n, k), bits = shape, self.stored_bits
        scales = n * self.groups(k)
        zero_points = 0 if self.symmetric else -(-scales * bits // 8)
        return n * k * bits // 8 + (scales + n) * scale_bytes + zero_points

    @property
    def in_planes(self) -> bool:
        return False

    def takes_part_group(self, in_features: int) -> bool:
        """The groups are spelled out where they are expanded."""
        return False

    @property
    def scales_in_sum(self) -> bool:
        return False

    @property
    def rows_readable(self) -> bool:
        return False

    @property
    def folds_columns(self) -> bool:
        """The expansion multiplies by it."""
        return True

    @property
    def interchangeable(self) -> bool:
        return False


def _check(name: str, weight: IntegerFormat, activation: ActivationFormat | None) -> None:
    """Refuse what no target runs."""
    whole = weight.group_size in (PER_CHANNEL, PER_TENSOR)
    expands = isinstance(weight, ExpandedFormat)
    if expands and whole:
        raise RecipeError(f"scheme {name!r}: without groups there is nothing to expand", remedy="Leave out _int")
    if weight.coarse_scales and (whole or expands):
        raise RecipeError(
            f"scheme {name!r}: 8-bit scales are those of groups that a kernel reads",
            remedy="Leave out _s8" if expands else "Leave out _s8, or use groups: w4a16_g32_s8",
        )
    if weight.coarse_scales and weight.bits == 8:
        raise RecipeError(
            f"scheme {name!r}: codes of 8 bits are finer than scales of 8 bits, which would clip them",
            remedy="Leave out _s8",
        )
    if weight.bits in (5, 6) and (whole or activation is not None):
        raise RecipeError(
            f"scheme {name!r}: {weight.bits}-bit weights have groups and float activations",
            remedy=f"Use w{weight.bits}a16_g32_s8",
        )
    if weight.bits == 2 and whole and activation is None:
        raise RecipeError(f"scheme {name!r}: 2-bit weights need groups", remedy="Use w2a16_g64 or w2a16_g128")
    if activation is None:
        return
    if weight.bits == 2:
        raise RecipeError(f"scheme {name!r}: 2-bit weights take float activations", remedy="Use w2a16_g64")
    if weight.bits == 8 and not (whole and weight.symmetric) or whole and not weight.symmetric:
        raise RecipeError(
            f"scheme {name!r}: an 8-bit integer matmul takes symmetric weights with one scale per output channel",
            remedy="Use w8a8_dyn or w8a8_static" if weight.bits == 8 else "Use w4a8, or groups: w4a8_g128_asym",
        )
    if activation.bits == 4 and weight.scales_in_sum:
        raise RecipeError(
            f"scheme {name!r}: 4-bit activations need an integer matmul", remedy="Use w4a4 or w4a4_g128_int"
        )
