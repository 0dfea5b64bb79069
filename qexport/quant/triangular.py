"""The inverse of a triangular matrix in its own place."""

import torch
from torch import Tensor

_LEAF = 128  # below, a triangular solve is as fast as products
_SKIPPING = 512  # above, a product leaves out the zeros of a triangular matrix, by halves


def invert_lower_(matrix: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse.

    By halves, [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: nearly everything is matrix products, and beside
    the matrix there is never more than half of its size. A triangular solve against the identity, the way that LAPACK's
    interface in PyTorch leaves, computes three times as much.

    Args:
        matrix: float [K, K], zero above the diagonal, not zero on it; changed in place.
    """
    size = len(matrix)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = -(-size // 2 // _LEAF) * _LEAF
    upper, cross, lower = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    invert_lower_(upper)
    invert_lower_(lower)
    cross.copy_(_from_right(_from_left(lower, cross), upper)).neg_()


def _from_left(lower: Tensor, matrix: Tensor) -> Tensor:
    """lower @ matrix, without most of the multiplications by the zeros of a lower triangular matrix."""
    size = len(lower)
    if size <= _SKIPPING:
        return lower @ matrix
    half = size // 2
    result = torch.empty_like(matrix)
    result[:half] = _from_left(lower[:half, :half], matrix[:half])
    result[half:] = _from_left(lower[half:, half:], matrix[half:]).addmm_(lower[half:, :half], matrix[:half])
    return result


def _from_right(matrix: Tensor, lower: Tensor) -> Tensor:
    """matrix @ lower, in the same way."""
    size = len(lower)
    if size <= _SKIPPING:
        return matrix @ lower
    half = size // 2
    result = torch.empty_like(matrix)
    result[:, half:] = _from_right(matrix[:, half:], lower[half:, half:])
    result[:, :half] = _from_right(matrix[:, :half], lower[:half, :half]).addmm_(matrix[:, half:], lower[half:, :half])
    return result
