"""HQQ, half-quadratic quantization (Badri and Shaji, 2023): scales that make the rounding error sparse, without data.

The error r = w - Q(w) is measured by sum |r|^p with p < 1, which forgives a few large errors for many small ones. The
method splits it in two: an auxiliary error e, which has a closed form (shrinkage), and the grid, fitted to w - e.

The original moves a zero point that is a real number and leaves the scale alone. Here a zero point is a code, and its
update hardly ever reaches half a code, so the scale is fitted instead, by least squares. Residuals are taken in steps
of the plain grid, so that beta means the same for every group and the result scales with the weight. With beta 1,
rounding errors count in full and only what is clipped by more than a step is cut off. With the original's 10 in these
units rounding errors are cut off too, scales shrink until large weights are clipped, and language models get worse.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import RecipeError
from .affine import CHUNK, encode, row_chunks, search_clip, weight_scales
from .formats import PER_TENSOR, IntegerFormat, QuantizedWeight

_TINY = torch.finfo(torch.float32).tiny


def hqq_quantize(
    w: Tensor, fmt: IntegerFormat, *, p: float = 0.7, beta: float = 1.0, kappa: float = 1.01, iterations: int = 20
) -> QuantizedWeight:
    """Quantize a weight with scales that make its error sparse.

    The search starts at the clipped range with the least squared error: the l_p objective has other minima, with a
    lower value and a squared error several times as large, where most of a heavy-tailed group is clipped away. Of all
    that it passes, and plain rounding to nearest, every group keeps what has the least sum |r|^p.

    Args:
        w: float [N, K].
        p: power of the error, above 0 and up to 1.
        beta: weight that ties the auxiliary error to the residual, in steps of the plain grid.
        kappa: growth of beta, at least 1.
        iterations: updates of each scale.
    Returns:
        codes of [N, K], scales float32 [N, G], zero points uint8 [N, G] or None.
    Raises:
        NumericsError: NaN or Inf, or a range beyond float32.
        RecipeError: an option is out of range.
    """
    if not (0 < p <= 1 and beta > 0 and kappa >= 1):
        wrong = f"HQQ with p {p}, beta {beta} and kappa {kappa}"
        raise RecipeError(wrong, remedy="Use 0 < p <= 1, beta > 0, kappa >= 1")
    plain, clipped = weight_scales(w, fmt), search_clip(w, fmt)
    scale = torch.empty_like(plain[0])
    zero_point = None if plain[1] is None else torch.empty_like(plain[1])
    for rows, pieces in _parts(w, fmt):
        best = _sparsest(pieces, _Grid(rows, *plain, fmt), _Grid(rows, *clipped, fmt), p, beta, kappa, iterations)
        scale[rows] = best.step[..., 0]
        if zero_point is not None:
            zero_point[rows] = (best.low.neg() + fmt.qmin)[..., 0].to(torch.uint8)
    return QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)


class _Grid:
    """Steps of some groups and the least and the largest multiple of each that has a code, all [rows, G, 1]."""

    def __init__(self, rows: slice, scale: Tensor, zero_point: Tensor | None, fmt: IntegerFormat) -> None:
        self.step = scale[rows, :, None]
        zero = torch.zeros_like(self.step) if zero_point is None else zero_point[rows, :, None].float()
        self.low, self.high = fmt.qmin - zero, fmt.qmax - zero

    def multiples(self, x: Tensor) -> Tensor:
        """The multiples of the step that stand for x [rows, G, n]."""
        return torch.div(x, self.step).round_().clamp_(self.low, self.high)

    def replace(self, where: Tensor, other: "_Grid") -> None:
        """Take over the groups of another grid where the mask [rows, G, 1] says so."""
        for name in ("step", "low", "high"):
            setattr(self, name, torch.where(where, getattr(other, name), getattr(self, name)))


def _sparsest(
    pieces: list[Tensor], plain: _Grid, grid: _Grid, p: float, beta: float, kappa: float, iterations: int
) -> _Grid:
    """The grid with the least objective of every group: the plain one, or one on the way from `grid`."""
    unit, best = plain.step.clone(), plain
    least, _ = _measure(pieces, plain, unit, p, beta)
    for iteration in range(iterations + 1):
        objective, change = _measure(pieces, grid, unit, p, beta * kappa**iteration)
        better = objective < least
        least = torch.where(better, objective, least)
        best.replace(better, grid)
        moved = grid.step + unit * change
        grid.step = torch.where(moved >= _TINY, moved, grid.step)
    return best


def _measure(pieces: list[Tensor], grid: _Grid, unit: Tensor, p: float, beta: float) -> tuple[Tensor, Tensor]:
    """sum |r|^p of every group, and the change of its step, both [rows, G, 1] in units.

    With e the shrunk residual sign(r) max(|r| - |r|^(p-1) / beta, 0), least squares of w - e on the codes changes the
    step by sum(codes (r - e)) / sum(codes^2), and r - e is r cut off at |r|^(p-1) / beta.
    """
    objective, along, square = (torch.zeros_like(unit) for _ in range(3))
    for x in pieces:
        codes = grid.multiples(x)
        residual = torch.addcmul(x, codes, grid.step, value=-1).div_(unit)
        size = residual.abs().clamp_min_(_TINY)
        power = size.pow(p)
        objective += power.sum(-1, keepdim=True)
        cut = torch.minimum(size, power.div_(size).div_(beta)).copysign_(residual)
        along += cut.mul_(codes).sum(-1, keepdim=True)
        square += codes.square_().sum(-1, keepdim=True)
    return objective, along / square.clamp_min_(1)


def _parts(w: Tensor, fmt: IntegerFormat) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of the scales, and the weights that they scale in pieces [rows, G, n] that fit the cache."""
    if fmt.group_size == PER_TENSOR:
        yield slice(0, 1), [piece.float().view(1, 1, -1) for piece in w.reshape(-1).split(CHUNK)]
        return
    for rows, chunk in row_chunks(w, fmt):
        yield rows, [chunk.float()]
