"""Linear attention by the gated delta rule (Yang et al., "Gated Delta Networks", arXiv 2412.06464).

For each head a state S maps keys to values. A token lets it decay, and moves what it gives for the token's key towards
the token's value: S_t = a_t S_{t-1} + b_t k_t (v_t - (a_t S_{t-1})^T k_t)^T, o_t = scale * S_t^T q_t.
"""

import torch
from torch import Tensor

from .derivatives import differentiate


@torch.library.custom_op("qexport::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, past: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens, and the state behind the last one.

    Args:
        query, key: [batch, tokens, heads, d]; value: [batch, tokens, heads, v].
        decay: log a, at most 0, [batch, tokens, heads], or [batch, tokens, heads, d] with one for each row; beta: b,
            [batch, tokens, heads].
        past: the state in front, [batch, heads, d, v]; zeros in front of a text.
        scale: of outputs.

    Returns:
        [batch, tokens, heads, v]; [batch, heads, d, v].
    """
    return _delta_rule(query, key, value, decay, beta, past, scale)


def _delta_rule(query, key, value, decay, beta, past, scale) -> tuple[Tensor, Tensor]:
    state, made = past.float() * 1.0, []
    for q, k, v, a, b in zip(*(t.float().unbind(1) for t in (query, key, value, decay, beta)), strict=True):
        state = state * a.exp().reshape(*a.shape[:2], -1, 1)
        wrong = v - (state * k[..., None]).sum(2)
        state = state + k[..., None] * (b[..., None] * wrong)[:, :, None]
        made.append(scale * (state * q[..., None]).sum(2))
    out = torch.stack(made, 1) if made else value.float() * 1.0
    return out.to(value.dtype), state.to(past.dtype)


@gated_delta_rule.register_fake
def _(query, key, value, decay, beta, past, scale):
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(gated_delta_rule, _delta_rule)
