"""What a weight format is, and the registry through which everything else finds one.

A format is one frozen dataclass: it reads its name, makes codes of weights and weights of codes, counts its bytes, says
which shapes it fits and what can be done with its codes. How it stands in a graph says `passes.formats`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self, TypeVar

from torch import Tensor

from ...errors import RecipeError
from ...plugins import import_plugins
from ..grids import GROUP_SIZES, ActivationFormat, GroupedCodes


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear as codes.

    Attributes:
        codes: [N, K]; of a grid of integers int8 when it is symmetric (4-bit codes too) and uint8 when it is not.
        scale: float32 [N, G], positive; [1, 1] when there is one for the tensor.
        zero_point: uint8, shaped like scale; None where the format has none.
        format: says what they stand for.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: "WeightFormat"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K] that the codes stand for."""
        return self.format.decode(self.codes, self.scale, self.zero_point)


@dataclass(frozen=True)
class WeightFormat(GroupedCodes, ABC):
    """How the weight of a linear, [out_features, in_features], is kept.

    Attributes:
        stem: what its names begin with, as a regular expression over lower-case letters.
        options: what may follow the stem in a name.
        examples: names of it, for messages.
        short: names that other tools use, and what they mean.
        candidates: names that mixed precision offers on every target, besides those that a target names itself.
    """

    stem: ClassVar[str]
    options: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()
    short: ClassVar[Mapping[str, str]] = {}
    candidates: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def parse(cls, match: re.Match[str]) -> tuple["WeightFormat", ActivationFormat | None]:
        """The formats that a name means: of the weight, and of the input (None: float).

        Args:
            match: of the whole name with stem and options.

        Raises:
            RecipeError: no target runs this.
        """

    @abstractmethod
    def scales(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every group of w, float [N, K]; see `QuantizedWeight`.

        Raises:
            NumericsError: w has NaN or Inf, or a range beyond float32.
        """

    @abstractmethod
    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The codes [N, K] of the values nearest to w, float [N, K] and finite."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The float32 weight [N, K] that codes stand for."""

    def round_to_nearest(self, w: Tensor, clip_search: bool = False) -> QuantizedWeight:
        """The nearest code of every weight.

        Args:
            w: float [N, K].
            clip_search: shrink the range of each group where that lowers the squared error; for formats whose scale
                can be any number.

        Raises:
            NumericsError: as `scales`.
        """
        scale, zero_point = self.scales(w)
        return QuantizedWeight(self.encode(w, scale, zero_point), scale, zero_point, self)

    def rounded(self, w: Tensor) -> Tensor:
        """The weight after rounding to nearest, float32 [N, K]; raises what `scales` raises."""
        return self.round_to_nearest(w).dequantize()

    def kept(self, weight: QuantizedWeight) -> QuantizedWeight:
        """A weight of this format with its scales as the file keeps them, whatever made them; the codes stay."""
        scale = self.kept_scale(weight.scale)
        return weight if scale is weight.scale else replace(weight, scale=scale)

    def multiplied(self, values: Tensor) -> Tensor:
        """The weight [N, K] that enters the product, of what the codes stand for."""
        return values

    # What a recipe and a plan ask

    def family(self, activation: ActivationFormat | None) -> str:
        """The preset that says everything else of a recipe which is a scheme alone."""
        return "w4a16_g32_rtn"

    @property
    def stored_bits(self) -> int:
        """Bits of a code as kernels read it, and of one in the file but where it lies there in planes."""
        return self.bits

    @property
    def in_planes(self) -> bool:
        """Whether the file has codes of fewer bits than kernels read, see `quant.planes`."""
        return False

    def bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        """Bytes in the file: codes, scales and zero points.

        Args:
            shape: of the weight, (N, K).
            scale_bytes: of one scale.
        """
        n, k = shape
        return -(-n * k * self.stored_bits // 8) + n * self.groups(k) * scale_bytes

    def fit(self, in_features: int, whole: bool = False) -> tuple[Self | None, str]:
        """The format that a weight of this width can take, None for none, and why it is not this one.

        Args:
            whole: the last group may not be shorter than the others.
        """
        size = self.group_size
        if size <= 0 or in_features % size == 0 or not whole and self.takes_part_group(in_features):
            return self, ""
        smaller = next((g for g in reversed(GROUP_SIZES) if g < size and in_features % g == 0), None)
        why = f"{in_features} input features do not divide into groups of {size}"
        if smaller is None:
            return None, f"{why} or any smaller power of two down to 16"
        return replace(self, group_size=smaller), f"{why}: groups of {smaller}"

    def takes_part_group(self, in_features: int) -> bool:
        """Whether the last group may be shorter than the others."""
        return False

    # What can be done with the codes

    @property
    def scales_in_sum(self) -> bool:
        """Whether scales differ between the input features of a product."""
        return self.group_size > 0

    @property
    def own_kernel(self) -> bool:
        """Whether a product with float inputs is written as one operator, where the target has it."""
        return self.group_size > 0

    @property
    def has_zero_points(self) -> bool:
        """Whether there is a zero point beside each scale."""
        return False

    @property
    def rows_readable(self) -> bool:
        """Whether single rows can be looked up, as an embedding does."""
        return False

    @property
    def folds_columns(self) -> bool:
        """Whether input features can carry a factor each, for nothing, that rounding did not see."""
        return False

    @property
    def interchangeable(self) -> bool:
        """Whether mixed precision may put one of its candidates in the place of this format."""
        return False


# Packages that bring formats name their modules under this group; importing a module registers what it declares.
ENTRY_POINTS = "qexport.formats"

_F = TypeVar("_F", bound=type[WeightFormat])
_FORMATS: list[type[WeightFormat]] = []


def weight_format(cls: _F) -> _F:
    """Register a format.

    Raises:
        ValueError: another format reads one of its names, or it one of the other's.
    """
    for other in _FORMATS:
        shared = [n for n in cls.examples if _match(other, n)] + [n for n in other.examples if _match(cls, n)]
        if other.stem == cls.stem or shared:
            raise ValueError(f"{cls.__name__} and {other.__name__} both read {', '.join(shared) or cls.stem}")
    _FORMATS.append(cls)
    return cls


def forget(cls: type[WeightFormat]) -> None:
    """Take a format out of the registry again."""
    _FORMATS.remove(cls)


def weight_formats() -> tuple[type[WeightFormat], ...]:
    """Every registered format, those of the package first.

    Raises:
        RecipeError: a package that brings formats cannot be imported.
    """
    _import_others()
    return tuple(_FORMATS)


@cache
def _import_others() -> None:
    import_plugins(ENTRY_POINTS, "formats")


def parse(name: str) -> tuple[WeightFormat, ActivationFormat | None]:
    """What the name of a scheme means, in lower case: format of the weight, and of the input (None: float).

    Raises:
        RecipeError: unknown name, or a combination that no target runs.
        ValueError: two formats read the name.
    """
    known = weight_formats()
    found = [(cls, match) for cls in known if (match := _match(cls, name)) is not None]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(cls.__name__ for cls, _ in found)} both read {name!r}")
    if not found:
        examples = ", ".join(example for cls in known for example in cls.examples)
        raise RecipeError(f"unknown scheme {name!r}", remedy=f"Schemes are {examples} and the like")
    cls, match = found[0]
    return cls.parse(match)


def regrouped(name: str, size: int) -> str:
    """The name of the same scheme with groups of another size."""
    stem = next(match for cls in weight_formats() if (match := re.match(cls.stem, name)) is not None).group()
    return f"{stem}_g{size}" + re.sub(r"_g\d+", "", name.removeprefix(stem), count=1)


def begins_as_scheme(text: str) -> bool:
    """Whether a text begins as the names of some format do."""
    return any(re.match(cls.stem, text) for cls in weight_formats())


def group_size(match: re.Match[str], digits: str) -> int:
    """The size of groups that a name gives.

    Raises:
        RecipeError: there are no groups of this size.
    """
    if int(digits) not in GROUP_SIZES:
        listed = ", ".join(map(str, GROUP_SIZES[:-1]))
        raise RecipeError(
            f"scheme {match.string!r} has groups of {digits}", remedy=f"Use {listed} or {GROUP_SIZES[-1]}"
        )
    return int(digits)


def _match(cls: type[WeightFormat], name: str) -> re.Match[str] | None:
    return re.fullmatch(f"(?:{cls.stem}){cls.options}", name)
