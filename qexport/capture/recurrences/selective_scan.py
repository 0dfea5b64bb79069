"""Mamba's selective scan, with a decay for each channel and state: Mamba, Falcon Mamba, Jamba, Zamba."""

import torch
from torch.nn import functional

from ..states import asked
from .registry import stands_for

ops = torch.ops.qexport


@stands_for("mamba_selective_scan")
def selective_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **kwargs
):
    """With the arguments and results of transformers' function.

    It begins with the state that the layer asked its cache for, where transformers' begins with zeros: in pieces, a
    prompt gives what it gives at once.
    """
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = functional.softplus(dt) if delta_softplus else dt
    x, dt, b, c = (part.transpose(1, 2) for part in (hidden_states, dt, B, C))
    past = asked.get().part(3)
    if past is None:
        past = x.new_zeros((x.shape[0], *A.shape))
    out, state = ops.selective_scan(x, dt, A, b, c, past)
    out = (out if D is None else out + x * D).transpose(1, 2)
    out = out if z is None else out * functional.silu(z)
    return (out, state) if return_last_state else out
