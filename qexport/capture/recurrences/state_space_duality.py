"""Mamba-2's recurrence (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060), a decay for each head and token.

It is linear attention: with step sizes dt, S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T and y_t = S_t^T C_t + D x_t. B
and C, in groups of heads, are its keys and queries. Mamba-2, Bamba, Falcon-H1, Granite hybrids, Nemotron-H, Zamba2.
"""

import torch
from torch.nn import functional

from .registry import stands_for

ops = torch.ops.qexport


@stands_for("mamba2_chunk_scan")
def chunk_scan(
    hidden_states, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, **kwargs,
):  # fmt: skip
    """With the arguments and results of transformers' function; states are [batch, heads, state, head]."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")):  # which a softplus keeps to
        dt = torch.clamp(dt, *map(float, dt_limit))
    if initial_states is None:
        batch, _, heads, width = hidden_states.shape
        initial_states = hidden_states.new_zeros((batch, heads, B.shape[-1], width))
    value = hidden_states * dt[..., None]
    out, state = ops.gated_linear_attention(C, B, value, A * dt, initial_states, 1.0)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * functional.silu(z)
    return (out, state) if return_final_states else out
