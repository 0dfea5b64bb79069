"""The gated delta rule, in chunks and token by token: Qwen3-Next, Qwen3.5, OLMo Hybrid.

Kimi's delta attention is the same with a decay for each feature of a key: Kimi Linear, Ling's hybrids.
"""

import torch

from .registry import stands_for

ops = torch.ops.qexport


@stands_for(
    "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
)  # fmt: skip
def delta_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **kwargs
):
    """With the arguments and results of transformers' functions."""
    batch, _, heads, width = key.shape
    repeats = value.shape[2] // heads
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    if repeats > 1:
        query, key = (x[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3) for x in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros((batch, value.shape[2], width, value.shape[3]))
    out, state = ops.gated_delta_rule(query, key, value, g, beta, initial_state, float(width**-0.5))
    return out, state if output_final_state else None
