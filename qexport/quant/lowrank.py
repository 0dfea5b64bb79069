"""Low-rank approximation of the error that rounding left in a weight.

LoRC (ZeroQuant-V2, arXiv 2303.08302) takes the singular vectors of W - W_rounded and adds their product back beside the
rounded weight; LQER (arXiv 2402.02446) takes those of the error with its columns weighted by the inputs' magnitude.
"""

import torch
from torch import Tensor

from ..errors import NumericsError
from .formats import IntegerFormat, QuantizedWeight

# Up to this many rows an exact eigendecomposition takes under half a second on one core; its cost grows with the cube.
_EXACT = 1024
_SPARE, _BLOCKS = 8, 13


def low_rank(error: Tensor, rank: int, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two factors of the best approximation of a weight's error by a matrix of this rank.

    Without weights it is the truncated singular value decomposition U S V with S^1/2 on both sides. With weights a, the
    column space is that of the best approximation of error * a, and the error is projected onto it: this is LQER's
    U S (V / a) without the division, so that features never seen are served too. The projection never makes the error
    larger, weighted or not.

    Sums are float64 and signs are fixed (the largest entry of every row of `up` is positive), so the factors depend on
    nothing but the input. Beyond 1024 rows and columns a block Krylov iteration with a fixed start replaces the exact
    decomposition (Musco and Musco, arXiv 1504.05477); on white noise, the worst case, it captures 0.1 % less.

    Args:
        error: float [N, K].
        rank: of the factors, cut to min(N, K).
        row_weights: non-negative [K], the weight of every input feature, as a row of `down` has one; None, or all
            zero: all equal.

    Returns:
        down float32 [K, r] and up float32 [r, N] such that x @ down @ up approximates x @ error.T.

    Raises:
        NumericsError: NaN or Inf in the error, or impossible weights.
    """
    wide = error.double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericsError("the error of a weight has NaN or Inf", remedy="Check the checkpoint")
    seen = wide
    if row_weights is not None:
        if not bool((torch.isfinite(row_weights) & (row_weights >= 0)).all()):
            raise NumericsError("the weight of an input feature is negative, NaN or Inf")
        if bool(row_weights.any()):
            seen = wide * row_weights.double()
    rows, columns = error.shape
    rank = min(rank, rows, columns)
    # The short side is the cheaper one. From there, singular values that are zero, or nearly, lead to columns that are
    # not orthonormal: hence the QR.
    left = _leading(seen, rank) if rows <= columns else torch.linalg.qr(seen @ _leading(seen.t(), rank)).Q
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    left = left * torch.where(largest < 0, -1.0, 1.0)
    right = wide.t() @ left
    half = right.norm(dim=0).sqrt()
    down = right / half.where(half > 0, 1.0)
    return down.float(), (left * half).t().float().contiguous()


def share_removed(error: Tensor, down: Tensor, up: Tensor) -> float:
    """The part of the squared norm of error [N, K] that down [K, r] @ up [r, N] takes away; 0 without an error."""
    wide = error.double()
    before = wide.square().sum()
    left = (wide - (down.double() @ up.double()).t()).square().sum()
    return float(1 - left / before) if before else 0.0


def quantize_factor(factor: Tensor) -> QuantizedWeight:
    """A factor [rows, columns] in int8 with one scale for each column; its codes are transposed, [columns, rows]."""
    return IntegerFormat(8).round_to_nearest(factor.t().contiguous())


def _leading(m: Tensor, rank: int) -> Tensor:
    """Orthonormal [n, rank], the left singular vectors of m [n, k], n <= k, with the largest singular values first."""
    n = m.shape[0]
    width = rank + _SPARE
    if n <= _EXACT or 2 * width * _BLOCKS > n:
        return _top(m @ m.t(), rank)
    start = torch.randn(n, width, dtype=m.dtype, generator=torch.Generator().manual_seed(0)).to(m.device)
    basis = [torch.linalg.qr(start).Q]
    while len(basis) < _BLOCKS:
        following, known = m @ (m.t() @ basis[-1]), torch.cat(basis, 1)
        basis.append(torch.linalg.qr(following - known @ (known.t() @ following)).Q)
    space = torch.linalg.qr(torch.cat(basis, 1)).Q
    projected = m.t() @ space
    return torch.matmul(space, _top(projected.t() @ projected, rank))


def _top(gram: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)
