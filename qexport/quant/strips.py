"""GPTQ of a strip of columns, each after the errors of those before it in the strip have reached it.

Two ways to the same codes: in operators of PyTorch, a few for every column, and on CUDA as one kernel for the whole
strip, because there starting an operator takes longer than it runs.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import in_a_line

logger = logging.getLogger(__name__)

WIDTH = 32  # columns of a strip
_TILE = 128  # rows of the weight that one program of the kernel takes


class Levels(Protocol):
    """Values that are not evenly spaced; see `formats.ScaledFormat`."""

    def nearest(self, steps: Tensor) -> Tensor: ...
    def values(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Grid:
    """The codes that columns are rounded to.

    Attributes:
        scale, zero: float32 [groups, N]; zero None: 0.
        groups: int64 [K], the group of every column, in the order of elimination from last to first.
        qmin, qmax: of a code.
        levels: the values of codes in steps, where these are not the codes themselves; then there is no zero. Of all
            groups, or of each.
        signed: whether codes are.
    """

    scale: Tensor
    zero: Tensor | None
    groups: Tensor
    qmin: int = 0
    qmax: int = 0
    levels: Levels | Sequence[Levels] | None = None
    signed: bool = False

    @property
    def rows(self) -> int:
        """N."""
        return self.scale.shape[1]

    def levels_of(self, strip: slice) -> "list[Levels] | None":
        """Those of columns, in the order of elimination."""
        groups = self.groups[strip]
        if self.levels is None:
            return None
        if isinstance(self.levels, Sequence):
            return [self.levels[group] for group in groups.tolist()]
        return [self.levels] * len(groups)


class StripRounder:
    """Rounds strips of weights whose columns lie side by side, each with its grid.

    Args:
        grids: of each weight.
        positions: int64 [K], where among its codes those of a column belong.

    Attributes:
        codes: int8 or uint8 [K, N] of each weight.
    """

    def __init__(self, grids: Sequence[Grid], positions: Tensor):
        self._grids, self._positions, device = grids, positions, positions.device
        ends = list(accumulate(grid.rows for grid in grids))
        self._parts = [slice(end - grid.rows, end) for grid, end in zip(grids, ends, strict=True)]
        self.codes = [
            torch.empty(len(positions), grid.rows, dtype=torch.int8 if grid.signed else torch.uint8, device=device)
            for grid in grids
        ]
        integers = all(grid.levels is None for grid in grids)
        self._kernel = compiled(device) if device.type == "cuda" and integers else None
        if self._kernel is None:
            self._steps = torch.empty(WIDTH, ends[-1], device=device)

    def round(self, first: int, columns: Tensor, inverse: Tensor, errors: Tensor) -> None:
        """Round columns from the last to the first.

        Args:
            first: number of the first column in the order of elimination.
            columns: float32 [n, sum of N], n at most `WIDTH`; changed.
            inverse: float32 [n, n], lower triangular: what an error of a column takes from those before it.
            errors: float32 [n, sum of N], gets the errors over the diagonal of `inverse`.
        """
        if self._kernel is None:
            self._in_operators(slice(first, first + len(columns)), columns, inverse, errors)
            return
        for part, grid, codes in zip(self._parts, self._grids, self.codes, strict=True):
            launch(self._kernel, grid, codes, self._positions, first, columns[:, part], inverse, errors[:, part])

    def _in_operators(self, strip: slice, columns: Tensor, inverse: Tensor, errors: Tensor) -> None:
        # Everything that a column needs is cut out for all at once: a view costs as much as its arithmetic.
        count, steps, passed = len(columns), self._steps[: len(columns)], errors.t()
        scale = torch.cat([grid.scale[grid.groups[strip]] for grid in self._grids], dim=1)
        runs = self._runs(strip)
        rows = zip(columns, errors, scale, steps, inverse.t(), inverse.diagonal().tolist(), strict=True)
        for j, (column, error, step, rounded, takes, pivot) in reversed(list(enumerate(rows))):
            if j + 1 < count:
                torch.addmv(column, passed[:, j + 1 :], takes[j + 1 :], alpha=-1, out=column)
            torch.div(column, step, out=rounded)
            for run in runs:
                run.round(j, rounded)
            torch.addcmul(column, rounded, step, value=-1, out=error).div_(pivot)
        positions = self._positions[strip]
        found = [codes for run in runs for codes in run.codes(steps)]
        for codes, new in zip(self.codes, found, strict=True):
            codes[positions] = new.to(codes.dtype)

    def _runs(self, strip: slice) -> "list[_Integers | _Table]":
        """Neighbours with the same values are rounded in one go."""
        runs: list[_Integers | _Table] = []
        for _, found in groupby(zip(self._parts, self._grids, strict=True), key=lambda pair: pair[1].levels):
            members = list(found)
            levels = members[0][1].levels_of(strip)
            runs.append(_Integers(members, strip) if levels is None else _Table(members, levels))
        return runs


class _Integers:
    """Rounding to integers of a range, in a strip of neighbouring weights."""

    def __init__(self, members: Sequence[tuple[slice, Grid]], strip: slice):
        grids = [grid for _, grid in members]
        self._part, self._sizes = slice(members[0][0].start, members[-1][0].stop), [grid.rows for grid in grids]
        self._zero: Tensor | None = None
        self._bounds: Sequence[tuple[Any, Any]] = [(grids[0].qmin, grids[0].qmax)] * WIDTH
        if all(grid.zero is None for grid in grids) and len({(grid.qmin, grid.qmax) for grid in grids}) == 1:
            return
        scales = [grid.scale[grid.groups[strip]] for grid in grids]
        zeros = [
            torch.zeros_like(scale) if grid.zero is None else grid.zero[grid.groups[strip]]
            for grid, scale in zip(grids, scales, strict=True)
        ]
        self._zero = torch.cat(zeros, dim=1)
        low, high = (
            torch.cat([bound - zero for bound, zero in zip(bounds, zeros, strict=True)], dim=1)
            for bounds in ([grid.qmin for grid in grids], [grid.qmax for grid in grids])
        )
        self._bounds = list(zip(low, high, strict=True))

    def round(self, j: int, steps: Tensor) -> None:
        """Column number j of the strip, in place."""
        low, high = self._bounds[j]
        steps[self._part].round_().clamp_(low, high)

    def codes(self, steps: Tensor) -> Sequence[Tensor]:
        """Of each weight, in numbers of any kind."""
        found = steps[:, self._part]
        return torch.split(found if self._zero is None else found + self._zero, self._sizes, dim=1)


class _Table:
    """Rounding to other values, in a strip of neighbouring weights that share them.

    Args:
        levels: of each column.
    """

    def __init__(self, members: Sequence[tuple[slice, Grid]], levels: Sequence[Levels]):
        self._part, self._sizes = slice(members[0][0].start, members[-1][0].stop), [grid.rows for _, grid in members]
        self._levels = levels
        self._found: dict[int, Tensor] = {}

    def round(self, j: int, steps: Tensor) -> None:
        """Column number j of the strip, in place."""
        part, levels = steps[self._part], self._levels[j]
        self._found[j] = levels.nearest(part)
        part.copy_(levels.values(self._found[j]))

    def codes(self, steps: Tensor) -> Sequence[Tensor]:
        """Of each weight."""
        return torch.split(torch.stack([self._found[j] for j in range(len(steps))]), self._sizes, dim=1)


def launch(
    kernel: Any, grid: Grid, codes: Tensor, positions: Tensor, first: int, columns: Tensor, inverse: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """`StripRounder.round` by a kernel; other arguments as `StripRounder` takes them."""
    size = columns.shape[1]
    with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():  # Triton starts on the current one
        kernel[(-(-size // _TILE),)](
            columns, inverse, errors, grid.scale, grid.scale if grid.zero is None else grid.zero,
            codes, grid.groups[first:], positions[first:], size, len(columns),
            columns.stride(0), inverse.stride(0), errors.stride(0), float(grid.qmin), float(grid.qmax),
            has_zero=grid.zero is not None, width=WIDTH, tile=_TILE,
        )  # fmt: skip


@cache
def compiled(device: torch.device) -> Any:
    """The kernel on a GPU; None where there is none: PyTorch came without Triton, or Triton finds no C compiler."""
    try:
        kernel, one = define_kernel(), torch.ones(1, 1, device=device)
        first, codes = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros_like(one, dtype=torch.int8)
        launch(kernel, Grid(one, None, first, -8, 7), codes, first, 0, one.clone(), one, torch.empty_like(one))
        return kernel if codes.item() == 1 else None
    except Exception as error:  # Triton, the compiler and the driver each have kinds of their own
        logger.info("GPTQ rounds in operators of PyTorch, not in one kernel: %s", in_a_line(error))
        return None


def define_kernel() -> Any:
    """The kernel of a strip, in Triton.

    Raises:
        ImportError: there is no Triton.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def round_strip(  # type: ignore[no-untyped-def]  # Triton reads the annotations itself
        columns, inverse, errors, scale, zero, codes, groups, positions, size, count,
        column_stride, inverse_stride, error_stride, qmin, qmax,
        has_zero: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        rows = tl.arange(0, width)
        at = tl.program_id(0) * tile + tl.arange(0, tile)
        there = at < size
        # A whole number between -2^22 and 2^22 more or less makes float32 round to nearest, half to even.
        magic = 12582912.0
        values = tl.load(
            columns + rows[:, None] * column_stride + at[None, :],
            mask=(rows[:, None] < count) & there[None, :], other=0.0,
        )  # fmt: skip
        for back in range(0, count):
            j = count - 1 - back
            column = tl.sum(tl.where(rows[:, None] == j, values, 0.0), axis=0)
            group, place = tl.load(groups + j), tl.load(positions + j)
            step = tl.load(scale + group * size + at, mask=there, other=1.0)
            steps = tl.div_rn(column, step)
            offset = tl.zeros_like(steps)
            if has_zero:
                offset = tl.load(zero + group * size + at, mask=there, other=0.0)
            steps = tl.minimum(tl.maximum(steps, qmin - offset), qmax - offset)
            steps = (steps + magic) - magic
            tl.store(codes + place * size + at, (steps + offset).to(codes.dtype.element_ty), mask=there)
            pivot = tl.zeros_like(step) + tl.load(inverse + j * inverse_stride + j)
            error = tl.div_rn(column - steps * step, pivot)
            tl.store(errors + j * error_stride + at, error, mask=there)
            factor = tl.load(inverse + j * inverse_stride + rows, mask=rows < j, other=0.0)
            values = values - factor[:, None] * error[None, :]

    return round_strip
