"""Codes as the weights that they stand for, with gradients for scales, zero points and, where wanted, codes."""

from typing import Any

import torch
from torch import Tensor


class _Dequantize(torch.autograd.Function):
    """(codes - zero) * scale of [G, group, N] with scale and zero [G, N]; keeps no float weight for the way back."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        return _centred(codes, zero).mul_(scale[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        codes, scale, zero = ctx.saved_tensors
        of_codes = grad * scale[:, None] if ctx.needs_input_grad[0] else None
        of_zero = grad.sum(1).mul_(-scale) if ctx.needs_input_grad[2] else None
        of_scale = _centred(codes, zero).mul_(grad).sum(1) if ctx.needs_input_grad[1] else None
        return of_codes, of_scale, of_zero


def _centred(codes: Tensor, zero: Tensor | None) -> Tensor:
    values = codes.to(torch.float32, copy=True)
    return values if zero is None else values.sub_(zero[:, None])


def dequantize_through(codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block_size: int) -> Tensor:
    """What `ops.dequantize_linear` gives of a matrix, in float32.

    Args:
        codes: [K, N], whole numbers of any dtype, or what codes of a table stand for.
        scale, zero, axis, block_size: as the operator takes them; groups lie along axis 0.
    """
    k, n = codes.shape
    size = block_size if block_size > 0 else k
    missing = -k % size

    def by_group(t: Tensor) -> Tensor:
        if block_size > 0:
            return t
        return t.reshape(1, -1).expand(1, n) if axis == 1 or t.dim() == 0 else t.reshape(-1, 1).expand(k, n)

    if block_size == 0 and axis == 0 and scale.dim() > 0:
        size, missing = 1, 0
    padded = torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes
    zeros = None if zero is None else by_group(zero).float()
    values: Tensor = _Dequantize.apply(padded.view(-1, size, n), by_group(scale), zeros)
    return values.reshape(-1, n)[:k]
