"""Mamba's selective scan (Gu and Dao, "Mamba", arXiv 2312.00752): a linear recurrence for each channel and state.

S_t[c, n] = exp(dt_t[c] A[c, n]) S_{t-1}[c, n] + dt_t[c] x_t[c] B_t[n] and y_t[c] = sum over n of S_t[c, n] C_t[n].
"""

import torch
from torch import Tensor

from .derivatives import differentiate


@torch.library.custom_op("qexport::selective_scan", mutates_args=())
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens, and the state behind the last one.

    Args:
        x, dt: [batch, tokens, channels]; dt at least 0.
        a: A, at most 0, [channels, states]; b, c: B and C, [batch, tokens, states].
        past: the state in front, [batch, channels, states]; zeros in front of a text.

    Returns:
        [batch, tokens, channels]; [batch, channels, states].
    """
    return _scan(x, dt, a, b, c, past)


def _scan(x, dt, a, b, c, past) -> tuple[Tensor, Tensor]:
    state, made = past.float() * 1.0, []
    for xt, step, bt, ct in zip(*(t.float().unbind(1) for t in (x * dt, dt, b, c)), strict=True):
        state = state * (step[..., None] * a).exp() + xt[..., None] * bt[:, None]
        made.append((state @ ct[..., None])[..., 0])
    out = torch.stack(made, 1) if made else x.float() * 1.0
    return out.to(x.dtype), state.to(past.dtype)


@selective_scan.register_fake
def _(x, dt, a, b, c, past):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(selective_scan, _scan)
