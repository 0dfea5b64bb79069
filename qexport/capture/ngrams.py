"""Embeddings of the last few tokens by a hash of their ids, and the ids that a cache holds for that: Qwen4.

The state of a text that begins is zeros in a file. So what is kept of an id is its distance from that of the end of a
text, which stands in front, in digits that every type of floats holds.
"""

from typing import Any

import torch
from torch import Tensor

from .recurrences.registry import stands_for_forward

_DIGITS, _BASE = 3, 256  # bfloat16 has the integers to 256
_STATE = 2  # which of the layer's convolutions the model takes the ids for


@stands_for_forward("Qwen4ExpTextNGramEmbedding")
def _embedded(embedding, path, input_ids, past_key_values):
    """What takes the place of the forward: [batch, sequence, features] of each token with those in front."""
    new, kept, end = input_ids.long(), embedding.context_len, embedding.eos_token_id
    past = past_key_values.past_inputs(embedding.layer_idx, _STATE)
    past = new.new_zeros(new.shape[0], _DIGITS, kept) if past is None else past.long()
    scales = torch.tensor([_BASE**place for place in range(_DIGITS)])
    history = torch.cat([((past * scales[:, None]).sum(1) + end) % embedding.unigram_vocab_size, new], 1)
    apart = (history[:, -kept:] - end) % embedding.unigram_vocab_size
    digits = torch.div(apart[:, None], scales[:, None], rounding_mode="floor") % _BASE
    past_key_values.keep_inputs(digits.float(), embedding.layer_idx, _STATE)

    back = [history[:, kept - place : history.shape[1] - place] for place in range(1, embedding.ngram_size)]
    return _looked_up(embedding, _without_other_texts([new, *back], end))


def _without_other_texts(tokens: list[Tensor], end: int) -> list[Tensor]:
    """Tokens so many places back, from 0 on, the end of a text in the place of those behind one."""
    found, same = [tokens[0]], torch.ones_like(tokens[0], dtype=torch.bool)
    for before in tokens[1:]:
        same = same & (before != end)
        found.append(torch.where(same, before, end))
    return found


def _looked_up(embedding, tokens: list[Tensor]) -> Tensor:
    """Rows of the table by hashes of two tokens, of three and so on, side by side."""
    hashes, heads = [], embedding.heads_per_ngram
    mixed = tokens[0] * embedding.layer_multipliers[0]
    for back in range(1, embedding.ngram_size):
        mixed = torch.bitwise_xor(mixed, tokens[back] * embedding.layer_multipliers[back])
        own = slice((back - 1) * heads, back * heads)
        sizes, offsets = embedding.ngram_heads_vocab_sizes[own], embedding.ngram_heads_offsets[own]
        hashes.append(torch.remainder(mixed[..., None], sizes) + offsets)
    return embedding.ngram_embedding(torch.cat(hashes, -1)).flatten(-2)


@stands_for_forward("Qwen4ExpTextPLELayer")
def _beside_convolution(layer, path, hidden_states, input_ids, past_key_values, conv_mask=None):
    """The module's own forward, whose convolution has holes and keeps as many inputs as it says."""
    return type(layer).forward(layer, hidden_states, input_ids, _Wider(past_key_values), conv_mask=conv_mask)


class _Wider:
    """A cache for convolutions that say how many inputs are kept, where others say how many they read."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_conv_state(self, inputs: Tensor, layer_idx: int, state_idx: int, conv_kernel_size: int) -> Tensor:
        return self._cache.update_conv_state(inputs, layer_idx, state_idx, conv_kernel_size=conv_kernel_size + 1)
