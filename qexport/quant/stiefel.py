"""Orthogonal matrices that are learned: gradient descent on the Stiefel manifold by Cayley transforms.

A step along the skew-symmetric part of the gradient, A = G Q^T - Q G^T, goes to (1 + a/2 A)^-1 (1 - a/2 A) Q, which is
orthogonal again (Wen and Yin 2013; SpinQuant, arXiv 2405.16406, learns its rotations so).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def descend(
    start: Tensor, loss: Callable[[Tensor, int], Tensor], steps: int, rate: float, momentum: float = 0.9
) -> Tensor:
    """Lower a function of an orthogonal matrix.

    Args:
        start: float64 [d, d], orthogonal.
        loss: of the matrix and the number of the step, which may choose what it is measured on.
        steps: how many; rate: the mean angle by which the first one turns; it falls to 0.

    Returns:
        float64 [d, d], orthogonal.
    """
    turn, speed = start.clone(), torch.zeros_like(start)
    one = torch.eye(len(start), dtype=start.dtype)
    for step in range(steps):
        given = turn.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(given, step), given)
        skew = gradient @ turn.t()
        speed = momentum * speed + (skew - skew.t())
        size = (torch.linalg.vector_norm(speed) / len(start) ** 0.5).clamp_min(1e-30)
        small = speed * (rate * (1 - step / steps) / size / 2)
        turn = torch.linalg.solve(one + small, (one - small) @ turn)
    return turn.contiguous()
