"""The matrix memory of xLSTM (Beck et al., "xLSTM", arXiv 2405.04517): linear attention with exponential gates.

C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t and h_t = C_t^T q_t / max(|n_t q_t|, 1), with i = exp of
its preactivation and f = sigmoid of its own. Sums are kept as multiples of exp(m_t), m_t = max(log f_t + m_{t-1}, i_t),
so that none overflows.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .derivatives import differentiate


@torch.library.custom_op("qexport::matrix_lstm", mutates_args=())
def matrix_lstm(
    query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor, past: Tensor, scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of all tokens, and the memory behind the last one.

    Args:
        query, key: [batch, tokens, heads, d]; value: [batch, tokens, heads, v].
        input_gate, forget_gate: preactivations, [batch, tokens, heads].
        past: the memory in front, [batch, heads, d, v + 2]: C, n and in every row m; zeros in front of a text.
        scale: of queries; eps: added to what outputs are divided by.

    Returns:
        [batch, tokens, heads, v]; [batch, heads, d, v + 2].
    """
    return _remember(query, key, value, input_gate, forget_gate, past, scale, eps)


def _remember(query, key, value, input_gate, forget_gate, past, scale, eps) -> tuple[Tensor, Tensor]:
    memory, most, made = past.float()[..., :-1], past.float()[..., :1, -1:], []
    ones = torch.ones_like(value[..., :1])
    parts = (query * scale, key, torch.cat([value, ones], -1), input_gate, functional.logsigmoid(forget_gate.float()))
    for q, k, v, i, f in zip(*(part.float().unbind(1) for part in parts), strict=True):
        i, f = i[..., None, None], f[..., None, None]
        top = torch.maximum(f + most, i)
        memory = (f + most - top).exp() * memory + (i - top).exp() * k[..., None] * v[..., None, :]
        most = top
        out = (memory * q[..., None]).sum(2)
        made.append(out[..., :-1] / (torch.maximum(out[..., -1:].abs(), (-most[..., 0]).exp()) + eps))
    out = torch.stack(made, 1) if made else value.float() * 1.0
    return out.to(value.dtype), torch.cat([memory, most.expand(*memory.shape[:-1], 1)], -1).to(past.dtype)


@matrix_lstm.register_fake
def _(query, key, value, input_gate, forget_gate, past, scale, eps):
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(matrix_lstm, _remember)
