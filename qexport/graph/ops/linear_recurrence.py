"""A linear recurrence for each channel, with gates that depend on the token: S_t = g_t S_{t-1} + x_t.

Griffin's (De et al., "Griffin", arXiv 2402.19427) and whatever has no keys and queries around its state.
"""

import torch
from torch import Tensor

from .derivatives import differentiate


@torch.library.custom_op("qexport::linear_recurrence", mutates_args=())
def linear_recurrence(gate: Tensor, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """States of all tokens, and the one behind the last.

    Args:
        gate, x: [batch, tokens, channels].
        past: the state in front, [batch, channels]; zeros in front of a text.

    Returns:
        [batch, tokens, channels]; [batch, channels].
    """
    return _states(gate, x, past)


def _states(gate, x, past) -> tuple[Tensor, Tensor]:
    state, made = past.float() * 1.0, []
    for g, new in zip(gate.float().unbind(1), x.float().unbind(1), strict=True):
        state = g * state + new
        made.append(state)
    out = torch.stack(made, 1) if made else x.float() * 1.0
    return out.to(x.dtype), state.to(past.dtype)


@linear_recurrence.register_fake
def _(gate, x, past):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(linear_recurrence, _states)
