"""Attention with a cache, its mask, and rotary embedding as single graph nodes.

Each op has the meaning PyTorch executes (below), a fake for tracing and one ONNX translation in `qexport.lower`.
Attention and rotary embedding have derivatives too: plain functions that are run again on the way back.
"""

import torch
from torch import Tensor

from ...device import has_bfloat16_products
from .derivatives import differentiate

# Added to the score of a hidden key. Finite, so that a query that sees no key at all (a padded position) stays finite
# instead of spreading NaN through its value rows, and far inside the range of float16.
MASKED = -30000.0


@torch.library.custom_op("qexport::causal_mask", mutates_args=())
def causal_mask(attention_mask: Tensor, past_length: int, window: int) -> Tensor:
    """The additive mask of causal attention over a cache.

    Args:
        attention_mask: [batch, past + new] bool or integer, 0 for padding.
        past_length: cached tokens; query i sits at position past_length + i.
        window: keys further back than window - 1 positions are hidden; 0 for no limit.

    Returns:
        [batch, 1, new, past + new] float32, 0 for a visible key and MASKED for a hidden one.
    """
    key = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    query = key[past_length:, None]
    visible = key <= query
    if window > 0:
        visible = visible & (key > query - window)
    visible = visible & attention_mask.bool()[:, None, None, :]
    return torch.where(visible, 0.0, MASKED)


@causal_mask.register_fake
def _(attention_mask, past_length, window):
    batch, total = attention_mask.shape
    return attention_mask.new_empty((batch, 1, total - past_length, total), dtype=torch.float32)


@torch.library.custom_op("qexport::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor,
    scale: float, softcap: float, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention of new tokens over cached and new keys.

    Args:
        query: [batch, heads, sequence, head_dim].
        key, value: [batch, kv_heads, sequence, head_dim]; heads is a multiple of kv_heads.
        past_key, past_value: [batch, kv_heads, past, head_dim].
        mask: additive, [batch, 1, sequence, past + sequence].
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 for none.
        sinks: [heads], a score of each head that takes its share of the softmax and has no value.

    Returns:
        output [batch, sequence, heads, head_dim]; present_key and present_value [batch, kv_heads, past + sequence,
        head_dim].
    """
    return _attend(query, key, value, past_key, past_value, mask, scale, softcap, sinks)


def _attend(
    query, key, value, past_key, past_value, mask, scale, softcap, sinks=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    present_key, present_value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    mask = mask.to(query.dtype)
    if softcap == 0.0 and sinks is None:
        kind = torch.bfloat16 if query.dtype == torch.float32 and has_bfloat16_products(query.device) else query.dtype
        # As bfloat16 in one go: PyTorch's own way rounds factors tile by tile, and takes longer than float32 does.
        out = torch.nn.functional.scaled_dot_product_attention(
            query.to(kind), present_key.to(kind), present_value.to(kind), attn_mask=mask.to(kind), scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        ).to(query.dtype)  # fmt: skip
    else:
        repeat = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(repeat, dim=1) for t in (present_key, present_value))
        scores = query @ keys.transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        scores = (softcap * torch.tanh(scores / softcap) if softcap else scores) + mask.to(scores.dtype)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        weights = weights if sinks is None else weights[..., :-1]
        out = weights.to(query.dtype) @ values
    return out.transpose(1, 2).contiguous(), present_key, present_value


@cached_attention.register_fake
def _(query, key, value, past_key, past_value, mask, scale, softcap, sinks=None):
    batch, heads, sequence, head_dim = query.shape
    total = past_key.shape[2] + sequence
    return (
        query.new_empty((batch, sequence, heads, value.shape[3])),
        key.new_empty((batch, key.shape[1], total, head_dim)),
        value.new_empty((batch, value.shape[1], total, value.shape[3])),
    )


@torch.library.custom_op("qexport::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head.

    Args:
        x: [batch, heads, sequence, d].
        cos, sin: [batch, sequence, d/2].
    """
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@rotary_embedding.register_fake
def _(x, cos, sin):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


differentiate(cached_attention, _attend)
differentiate(rotary_embedding, _rotate)
