"""Formats whose values are steps times a scale, and the scales known before the codes: GPTQ can move their codes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...errors import NumericsError, RecipeError
from ..affine import FINITE_REMEDY, grouped, row_chunks, row_slices, ungrouped
from .base import QuantizedWeight, WeightFormat

_TINY = torch.finfo(torch.float32).tiny


class SteppedFormat(WeightFormat, ABC):
    """A format whose scales can be taken first, from the range of each group, and whose codes are then independent."""

    def for_weight(self, w: Tensor) -> Self:
        """The format with what it takes from the whole of a weight, float [N, K]: most take nothing."""
        return self

    @abstractmethod
    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `scales`, of each group the one with the least squared rounding error of those over a part of its range.

        Args:
            w: float [N, K].
            importance: non-negative [K], the weight of an input feature's squared error; None: all equal.

        Raises:
            NumericsError: as `scales`, or an importance that is negative, NaN or Inf.
        """

    def best_scales(self, w: Tensor, candidates: Iterable[Tensor], importance: Tensor | None) -> Tensor:
        """Of each group the candidate, float32 [N, G], with the least squared rounding error, the first of equals.

        Raises:
            NumericsError: an importance that is negative, NaN or Inf.
        """
        if importance is not None and not bool((torch.isfinite(importance) & (importance >= 0)).all()):
            raise NumericsError("the importance of an input feature is negative, NaN or Inf")
        first, *others = candidates
        best, least = first, self.errors(w, first, importance)
        for scale in others:
            error = self.errors(w, scale, importance)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best

    def errors(self, w: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
        """The squared rounding error of every group, float32 [N, G]."""
        errors = torch.empty_like(scale)
        for rows in row_slices(*w.shape):
            part, step = w[rows].float(), scale[rows]
            off = self.decode(self.encode(part, step, None), step, None).sub_(part).square_()
            if importance is not None:
                off.mul_(importance)
            errors[rows] = grouped(off, self).sum(-1)
        return errors

    def round_to_nearest(self, w: Tensor, clip_search: bool = False) -> QuantizedWeight:
        fmt = self.for_weight(w)
        scale, zero_point = fmt.clipped_scales(w) if clip_search else fmt.scales(w)
        return QuantizedWeight(fmt.encode(w, scale, zero_point), scale, zero_point, fmt)


class ScaledFormat(SteppedFormat, ABC):
    """A few values, symmetric around zero, times a scale that the features of a group share, and neighbouring rows too.

    Attributes:
        ratios: of the range of a group, what a search for clipping tries.
    """

    ratios: ClassVar[tuple[float, ...]] = tuple(1 - i / 40 for i in range(21))

    @property
    def rows_per_scale(self) -> int:
        """How many consecutive output features share a scale; the last ones may be fewer."""
        return 1

    @abstractmethod
    def nearest(self, steps: Tensor) -> Tensor:
        """Codes uint8 of the values nearest to finite float32 numbers, of their shape."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """The float32 values of codes, of their shape."""

    @abstractmethod
    def scales_for(self, absmax: Tensor) -> Tensor:
        """The scales, float32 and positive, of groups with these largest magnitudes, float32 [N, G]."""

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        """The scale of each group.

        Raises:
            NumericsError: w has NaN or Inf, or a range beyond float32.
            RecipeError: K does not divide into groups, and the last one may not be shorter.
        """
        fmt = self.for_weight(w)
        return fmt.scales_for(fmt.absmax(w)), None

    def clipped_scales(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, None]:
        fmt = self.for_weight(w)
        absmax = fmt.absmax(w)
        return fmt.best_scales(w, [fmt.scales_for(absmax * ratio) for ratio in self.ratios], importance), None

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows, chunk in row_chunks(w, self):
            codes[rows] = ungrouped(self.nearest(chunk.float() / scale[rows, :, None]), w.shape[1])
        return codes

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, chunk in row_chunks(codes, self):
            out[rows] = ungrouped(self.values(chunk).mul_(scale[rows, :, None]), codes.shape[1])
        return out

    def errors(self, w: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
        """The same, summed over rows that share a scale."""
        found = super().errors(w, scale, importance)
        if self.rows_per_scale == 1:
            return found
        return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in found.split(self.rows_per_scale)])

    def absmax(self, w: Tensor) -> Tensor:
        """The largest magnitude of each group, float32 [N, G], the same for rows that share a scale."""
        n, k = w.shape
        if self.group_size > 0 and k % self.group_size and not self.takes_part_group(k):
            raise RecipeError(f"{k} input features do not divide into groups of {self.group_size}")
        absmax = torch.empty(n, self.groups(k), dtype=torch.float32, device=w.device)
        for rows, chunk in row_chunks(w, self):
            blocks = chunk.float()
            absmax[rows] = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
        if not bool(torch.isfinite(absmax).all()):
            raise NumericsError("the weight has NaN or Inf, or a range beyond float32", remedy=FINITE_REMEDY)
        if self.rows_per_scale == 1:
            return absmax
        return torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in absmax.split(self.rows_per_scale)])


def nonzero(absmax: Tensor) -> Tensor:
    """Scales, 1 where they are zero or subnormal."""
    return absmax.masked_fill(absmax < _TINY, 1)
