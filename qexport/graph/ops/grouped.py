"""Attention over a cache whose rows hold their real tokens first, and the reordering that makes it so.

ONNX Runtime's GroupQueryAttention appends to each row of the cache behind the tokens that the row holds, counts
positions from there, and knows no mask. Prompts of different length are mostly padded on the left. So rows of new
tokens are turned until their padding is behind the real tokens, and turned back before they leave the model.
"""

import torch
from torch import Tensor

from ...quant.kv_cache import cache_codes, read_cache, stored_cache
from .attention import _attend, _rotate


@torch.library.custom_op("qexport::real_first", mutates_args=())
def real_first(attention_mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How to put the real tokens of every row first, and how long its cache becomes.

    Args:
        attention_mask: [batch, past + new] integer, 0 for padding. The first tokens may have padding on the left and on
            the right, later ones none. A mask of a single later token may also have ones in front, for all tokens of
            its row with that one, and zeros behind them: so batches come whose rows have another length each.
        input_ids: [batch, new]; only its shape counts.

    Returns:
        forward, backward: [batch, new] int64, the places that new tokens are taken from, and taken back from.
        valid: [batch, 1, 1] bool, whether the row has padding only where it may.
        last: [batch] int32, the place of the row's last new token in its cache, padding behind the real ones included.
        total: int32 [1], past + new.
    """
    total, new = attention_mask.shape[1], input_ids.shape[1]
    mask = attention_mask != 0
    counted = mask.long().cumsum(1)
    held = counted[:, -1:].clamp(min=new)
    in_front = counted.gather(1, held - new) == held  # of several new tokens it cannot be
    real, mask = counted[:, total - new :], mask[:, total - new :]
    before = real[:, :1] - mask[:, :1].long()
    place = torch.arange(new, device=mask.device)
    lead = (real == 0).sum(1, keepdim=True)
    forward, backward = (place + lead) % new, (place - lead) % new
    many = real[:, -1:] - before
    turned = mask.gather(1, forward)
    valid = (turned == (place < many)).all(1, keepdim=True) & (many > 0) & ((many == new) | (total == new))
    valid, last = valid | in_front, (held[:, 0] - 1).to(torch.int32)
    return forward, backward, valid[..., None], last, torch.tensor([total], dtype=torch.int32, device=mask.device)


@real_first.register_fake
def _(attention_mask, input_ids):
    order = torch.empty_like(input_ids, dtype=torch.int64)
    return (
        order, torch.empty_like(order), order.new_empty((order.shape[0], 1, 1), dtype=torch.bool),
        order.new_empty((order.shape[0],), dtype=torch.int32), order.new_empty((1,), dtype=torch.int32),
    )  # fmt: skip


@torch.library.custom_op("qexport::take_tokens", mutates_args=())
def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of every row in another order.

    Args:
        x: [batch, tokens] or [batch, tokens, features].
        order: [batch, new tokens] int64, places in the row.
    """
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


@take_tokens.register_fake
def _(x, order):
    return x.new_empty((*order.shape, *x.shape[2:]))


@torch.library.custom_op("qexport::grouped_attention", mutates_args=())
def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, last: Tensor, total: Tensor,
    cos: Tensor | None, sin: Tensor | None, key_scale: Tensor | None, value_scale: Tensor | None, bits: int,
    scale: float, softcap: float, window: int, sinks: Tensor | None = None, e4m3: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention of new tokens over a cache that each row fills from its start.

    Args:
        query: [batch, sequence, heads * head_dim]; key, value: [batch, sequence, kv_heads * head_dim].
        past_key, past_value: [batch, kv_heads, past, head_dim], or codes as `quant.kv_cache.stored_cache` makes them.
        last, total: as `real_first` returns them.
        cos, sin: [positions, n / 2], tables that rotate the first n features of every head of query and key; None where
            those are as they should be.
        key_scale, value_scale, bits: of a cache of codes, see `quant.kv_cache`; None and 0 for one of floats.
        scale: factor of the scores; softcap: scores become softcap * tanh(scores / softcap), 0 for none.
        window: keys further back than window - 1 positions are hidden; 0 for no limit.
        sinks: as `cached_attention`.
        e4m3: codes are E4M3 numbers.
        bias: [1, heads, sequence, past + sequence], added to the scores, by the place of a key in its row.

    Returns:
        output [batch, sequence, heads * head_dim]; present_key and present_value [batch, kv_heads, past + sequence,
        head_dim], or codes like the past.
    """
    batch, kv_heads, past, _ = past_key.shape
    sequence, size = query.shape[1], key.shape[2] // past_key.shape[1]
    query, key, value = (t.view(batch, sequence, -1, size).transpose(1, 2) for t in (query, key, value))
    start = last.long() - (sequence - 1)
    place = start[:, None] + torch.arange(sequence, device=query.device)
    if cos is not None and sin is not None:
        width = 2 * cos.shape[1]
        query, key = (
            torch.cat([_rotate(t[..., :width], cos[place], sin[place]), t[..., width:]], dim=-1) for t in (query, key)
        )
    present, seen = [], []
    for old, new, step in ((past_key, key, key_scale), (past_value, value, value_scale)):
        new = new if step is None else stored_cache(new, step, bits, e4m3)
        old, new = (t.view(torch.uint8) if e4m3 else t for t in (old, new))  # PyTorch moves no 8-bit floats about
        room = torch.cat([old, old.new_zeros(new.shape)], dim=2)
        row = room.scatter(2, place[:, None, :, None].expand_as(new), new)
        present.append(row.view(torch.float8_e4m3fn) if e4m3 else row)
        seen.append(row if step is None else read_cache(row, step, bits, e4m3).to(query.dtype))
    index = torch.arange(past + sequence, device=query.device)
    visible = index <= place[..., None]
    if window > 0:
        visible = visible & (index > place[..., None] - window)
    mask = torch.where(visible, 0.0, -torch.inf)[:, None]
    mask = mask if bias is None else mask + bias.float()
    (keys, values), (present_key, present_value) = seen, present
    empty = keys[:, :, :0]
    out, _, _ = _attend(query, keys, values, empty, empty, mask, scale, softcap, sinks)
    return out.flatten(2), present_key, present_value


@grouped_attention.register_fake
def _(
    query, key, value, past_key, past_value, last, total, cos, sin, key_scale, value_scale, bits, scale, softcap,
    window, sinks=None, e4m3=False, bias=None,
):  # fmt: skip
    batch, kv_heads, past, size = past_key.shape
    present = past_key.new_empty((batch, kv_heads, past + query.shape[1], size))
    return torch.empty_like(query), present, torch.empty_like(present)


@torch.library.custom_op("qexport::position_bias", mutates_args=())
def position_bias(table: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """What is added to scores by the head and the place of a key in its row.

    Args:
        table: [heads, 1], slopes by which it grows, 0 at the last place; or [heads, places], what it is at each.
        attention_mask: [batch, past + new]; input_ids: [batch, new]; only their shapes count.

    Returns:
        [1, heads, new, past + new].
    """
    total, new = attention_mask.shape[1], input_ids.shape[1]
    if table.shape[1] == 1:
        row = table * torch.arange(1 - total, 1, device=table.device).to(table.dtype)
    else:
        row = table[:, :total]
    return row[None, :, None].repeat(1, 1, new, 1)


@position_bias.register_fake
def _(table, attention_mask, input_ids):
    return table.new_empty((1, table.shape[0], input_ids.shape[1], attention_mask.shape[1]))


@torch.library.custom_op("qexport::round_cache", mutates_args=())
def round_cache(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Keys or values as attention will read them from a cache of codes.

    Args:
        x: [batch, kv_heads, tokens, head_dim]; scale, bits: as `quant.kv_cache.cache_codes`.
    """
    return (cache_codes(x, scale, bits).float() * scale).to(x.dtype)


@round_cache.register_fake
def _(x, scale, bits):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
