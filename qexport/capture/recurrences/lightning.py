"""Lightning attention (Qin et al., arXiv 2401.04658), linear attention with a constant decay of each head: MiniMax."""

import torch
from transformers import Cache

from .registry import stands_for, stands_for_forward

stands_for("MiniMaxCache")(Cache)  # its own class of cache, which the model asks for


@stands_for_forward("MiniMaxLightningAttention")
def lightning_attention(layer, path, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
    """With the arguments and results of transformers' forward; states are [batch, heads, head, head]."""
    batch, tokens, _ = hidden_states.shape
    heads, width, number = layer.num_attention_heads, layer.head_dim, layer.layer_idx
    states = layer.act_fn(layer.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = states * attention_mask[:, :, None]
    query, key, value = states.reshape(batch, tokens, heads, 3 * width).split(width, dim=3)
    decay = -layer.slope_rate.reshape(1, 1, heads).expand(batch, tokens, -1)
    past = past_key_values.get_recurrent_state(number)
    if past is None:
        past = value.new_zeros((batch, heads, width, width))
    out, state = torch.ops.qexport.gated_linear_attention(query, key, value, decay, past, 1.0)
    past_key_values.update_recurrent_state(state, number)
    out = layer.norm(out.reshape(batch, tokens, heads * width))
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * out), None
