"""GPTQ of a strip of columns, each after the errors of those before it in the strip have reached it.

Two ways to the same codes: in operators of PyTorch, a few for every column, and on CUDA as one kernel for the whole
strip, because there starting an operator takes longer than it runs.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
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
    """

    scale: Tensor
    zero: Tensor | None
    groups: Tensor
    qmin: int = 0
    qmax: int = 0
    levels: Levels | Sequence[Levels] | None = None


class StripRounder:
    """Rounds strips of one weight.

    Args:
        codes: int8 or uint8 [K, N], gets the codes.
        positions: int64 [K], where in it the codes of a column belong.
    """

    def __init__(self, grid: Grid, codes: Tensor, positions: Tensor):
        self._grid, self._codes, self._positions = grid, codes, positions
        self._kernel = compiled(codes.device) if codes.is_cuda and grid.levels is None else None
        if self._kernel is None:
            self._numbers = grid.groups.tolist(), positions.tolist()
            self._steps = torch.empty(codes.shape[1], device=codes.device)

    def round(self, first: int, columns: Tensor, inverse: Tensor, errors: Tensor) -> None:
        """Round columns from the last to the first.

        Args:
            first: number of the first column in the order of elimination.
            columns: float32 [n, N], n at most `WIDTH`; changed.
            inverse: float32 [n, n], lower triangular: what an error of a column takes from those before it.
            errors: float32 [n, N], gets the errors over the diagonal of `inverse`.
        """
        if self._kernel is None:
            self._in_operators(first, columns, inverse, errors)
        else:
            launch(self._kernel, self._grid, self._codes, self._positions, first, columns, inverse, errors)

    def _in_operators(self, first: int, columns: Tensor, inverse: Tensor, errors: Tensor) -> None:
        (groups, positions), grid, steps = self._numbers, self._grid, self._steps
        pivots, count = inverse.diagonal().tolist(), len(columns)
        for j in range(count - 1, -1, -1):
            column, step = columns[j], grid.scale[groups[first + j]]
            if j + 1 < count:
                torch.addmv(column, errors[j + 1 :].t(), inverse[j + 1 :, j], alpha=-1, out=column)
            torch.div(column, step, out=steps)
            if grid.levels is not None:
                levels = grid.levels[groups[first + j]] if isinstance(grid.levels, Sequence) else grid.levels
                found = levels.nearest(steps)
                self._codes[positions[first + j]] = found
                steps.copy_(levels.values(found))
            elif grid.zero is None:
                steps.round_()
                self._codes[positions[first + j]] = steps.clamp_(grid.qmin, grid.qmax)
            else:
                steps.round_()
                zero = grid.zero[groups[first + j]]
                self._codes[positions[first + j]] = steps.add_(zero).clamp_(grid.qmin, grid.qmax)
                steps.sub_(zero)
            torch.addcmul(column, steps, step, value=-1, out=errors[j]).div_(pivots[j])


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
