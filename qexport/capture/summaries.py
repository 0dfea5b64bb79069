"""Attention to summaries of several tokens beside a window of single ones: DeepSeek V4.

A window of tokens that follow one another becomes one entry: a mean of what each of them gives, by weights of its own.
Transformers keeps the entries, and the tokens of a window that is not full yet. Here what every token gives is kept,
and all entries are made of it: the same numbers, for texts and steps of any length.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..graph.ops.attention import MASKED
from .attention import GraphCache, ProbeCache
from .kept import INDEXER, SUMMED
from .recurrences.registry import stands_for_forward

_Cache = GraphCache | ProbeCache


@stands_for_forward("DeepseekV4HCACompressor")
def _of_windows(compressor, path, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
    """What takes the place of the forward of a compressor whose windows lie side by side."""
    value, gate = _given(compressor, hidden_states, past_key_values, SUMMED, layer_idx)
    entries = _entries(compressor, value, gate + compressor.position_bias)
    # A call of one token sees all that there are, in transformers: the same where there is no padding.
    full, alone = torch.arange(entries.shape[1])[-2:-1], torch.ones_like(position_ids).sum(-1, keepdim=True) == 1
    past = torch.arange(entries.shape[1]) < torch.where(alone, full, _full(compressor, position_ids))[..., None]
    return entries[:, None], torch.where(past, 0.0, MASKED)[:, None]


@stands_for_forward("DeepseekV4CSACompressor")
def _of_overlapping_windows(compressor, path, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
    """What takes the place of the forward of a compressor whose windows reach back over the one in front."""
    entries = _overlapping(compressor, hidden_states, past_key_values, SUMMED, layer_idx)
    seen = compressor.indexer(hidden_states, q_residual, position_ids, past_key_values, layer_idx)
    return entries[:, None], torch.where(seen, 0.0, MASKED)[:, None]


@stands_for_forward("DeepseekV4Indexer")
def _choice(indexer, path, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
    """What takes the place of the indexer's forward: whether a token reads an entry, [batch, sequence, entries]."""
    entries = _overlapping(indexer, hidden_states, past_key_values, INDEXER, layer_idx)
    cos, sin = indexer.rotary_emb(hidden_states, position_ids=position_ids, layer_type=indexer.rope_layer_type)
    query = indexer.q_b_proj(q_residual).view(*hidden_states.shape[:2], -1, indexer.head_dim).transpose(1, 2)
    scores = indexer.scorer(_turned(indexer, query, cos, sin).transpose(1, 2), entries, hidden_states)
    past = torch.arange(entries.shape[1]) < _full(indexer, position_ids)[..., None]
    places = torch.ops.qexport.highest(torch.where(past, scores, MASKED), indexer.index_topk)
    return (torch.zeros_like(scores).scatter(-1, places, 1.0) > 0) & past


@stands_for_forward("DeepseekV4GroupedLinear")
def _group_by_group(grouped, path, x):
    """What takes the place of the forward of a linear for each group of features."""
    weights = grouped.weight.view(grouped.n_groups, -1, x.shape[-1])
    return torch.stack([linear(x[..., group, :], weights[group]) for group in range(grouped.n_groups)], -2)


def _given(module, hidden_states: Tensor, cache: _Cache, role: str, layer: int) -> tuple[Tensor, Tensor]:
    """What all tokens give to entries, and their weights, [batch, windows, width, features] each."""
    new = torch.cat([module.kv_proj(hidden_states), module.gate_proj(hidden_states)], -1)
    value, gate = windows(cache.update_rows(new, layer, role), module.compress_rate).chunk(2, -1)
    return value, gate


def windows(rows: Tensor, width: int) -> Tensor:
    """Rows [batch, tokens, features] of tokens side by side, [batch, windows, width, features].

    Behind those that are full there are two more, the first of which holds the rest: in the graph of a short text one
    alone would stay one for any text.
    """
    rows = torch.cat([rows, torch.zeros_like(rows[:, :1]).expand(-1, 2 * width, -1)], 1)
    return rows[:, : rows.shape[1] // width * width].unflatten(1, (-1, width))


def _overlapping(module, hidden_states: Tensor, cache: _Cache, role: str, layer: int) -> Tensor:
    """Entries of windows which take one half of the features from the window in front, the other from their own."""
    value, gate = _given(module, hidden_states, cache, role, layer)
    (before, value), (front, gate) = value.chunk(2, -1), (gate + module.position_bias).chunk(2, -1)
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
    front = torch.cat([torch.full_like(front[:, :1], MASKED), front[:, :-1]], 1)
    return _entries(module, torch.cat([before, value], 2), torch.cat([front, gate], 2))


def _entries(module, value: Tensor, gate: Tensor) -> Tensor:
    """[batch, windows, features] of what the tokens of each window give, turned to where it begins."""
    entries = module.kv_norm((value * gate.softmax(2)).sum(2))
    places = (torch.arange(entries.shape[1]) * module.compress_rate)[None]
    cos, sin = module.rotary_emb(entries, position_ids=places, layer_type=module.rope_layer_type)
    return _turned(module, entries[:, None], cos, sin)[:, 0]


def _full(module, position_ids: Tensor) -> Tensor:
    """How many windows are full behind each token."""
    return torch.div(position_ids + 1, module.compress_rate, rounding_mode="floor")


def _turned(module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last features of x [batch, heads, sequence, features] turned, of which pairs lie side by side."""
    width = 2 * cos.shape[-1]
    still, pairs = x[..., :-width], x[..., -width:].unflatten(-1, (-1, 2))
    one, other, cos, sin = pairs[..., 0], pairs[..., 1], cos[:, None], sin[:, None]
    turned = torch.stack([one * cos - other * sin, other * cos + one * sin], -1)
    return torch.cat([still, turned.flatten(-2)], -1)
