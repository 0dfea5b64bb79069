"""Linear attention with decay (Yang et al., "Gated Linear Attention", arXiv 2312.06635), and what is one: Mamba.

For each head a state S maps keys to values. A token lets it decay, row by row or as a whole, and adds its own pair:
S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.
"""

import torch
from torch import Tensor

from .derivatives import differentiate

_CHUNK = 64  # tokens that are computed at once where a head decays as a whole


@torch.library.custom_op("qexport::gated_linear_attention", mutates_args=())
def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens, and the state behind the last one.

    Args:
        query, key: [batch, tokens, groups, d], read by heads / groups heads each; value: [batch, tokens, heads, v].
        decay: log a, at most 0; [batch, tokens, heads], or [batch, tokens, heads, d] with one for each row.
        past: the state in front, [batch, heads, d, v]; zeros in front of a text.
        scale: of outputs.

    Returns:
        [batch, tokens, heads, v]; [batch, heads, d, v].
    """
    return _attend(query, key, value, decay, past, scale)


def _attend(query, key, value, decay, past, scale) -> tuple[Tensor, Tensor]:
    heads = value.shape[2]
    query, key = (x.float().repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    state, made, size = past.float() * 1.0, [], 1 if decay.dim() == 4 else _CHUNK
    parts = (x.float().split(size, dim=1) for x in (query, key, value, decay))
    for q, k, v, a in zip(*parts, strict=True):
        out, state = _step(q, k, v, a, state) if decay.dim() == 4 else _chunk(q, k, v, a, state)
        made.append(scale * out)
    return torch.cat(made, 1).to(value.dtype), state.to(past.dtype)


def _step(q, k, v, decay, state) -> tuple[Tensor, Tensor]:
    """One token whose rows decay by themselves."""
    q, k, v, decay = (x[:, 0] for x in (q, k, v, decay))
    state = state * decay.exp()[..., None] + k[..., None] * v[:, :, None]
    return (state * q[..., None]).sum(2)[:, None], state


def _chunk(q, k, v, decay, state) -> tuple[Tensor, Tensor]:
    """Some tokens at once: all exponents are sums of decays between two tokens, so none is above 0."""
    total = decay.double().cumsum(1).transpose(1, 2)  # [batch, heads, tokens]; differences of it cancel
    between = (total[..., None] - total[:, :, None]).float()
    seen = torch.ones_like(between, dtype=torch.bool).tril()
    weights = torch.where(seen, between, float("-inf")).exp()
    left, total = (total[..., -1:] - total).float().exp(), total.float()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * weights
    out = torch.einsum("bhts,bshv->bthv", scores, v)
    out = out + torch.einsum("bthd,bhdv,bht->bthv", q, state, total.exp())
    state = state * total[..., -1].exp()[..., None, None] + torch.einsum("bshd,bshv,bhs->bhdv", k, v, left)
    return out, state


@gated_linear_attention.register_fake
def _(query, key, value, decay, past, scale):
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(gated_linear_attention, _attend)
