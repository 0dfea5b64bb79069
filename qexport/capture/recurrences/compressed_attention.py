"""ZAYA's attention (arXiv 2510.04476): convolutions mix queries and keys, values are half of the token in front."""

import torch

from ..attention import GraphCache, ProbeCache
from .registry import stands_for_forward


@stands_for_forward("ZayaCCAProjection")
def _projection(projection, path, hidden_states, past_key_values, conv_mask=None):
    """The module's own forward, for which the state in front of a text is one as any other."""
    seen = _Seen(past_key_values, projection.v_proj_delayed.bias)
    return type(projection).forward(projection, hidden_states, seen, conv_mask)


class _Seen:
    """A layer's cache as this module takes it: it joins past and new inputs itself, and says which are kept.

    Args:
        bias: what takes the place of the token in front of the first one. What is kept goes without, so that it is
            zeros there; None for none.
    """

    def __init__(self, cache: GraphCache | ProbeCache, bias: torch.Tensor | None):
        self._cache, self._bias = cache, bias

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._cache.past_inputs(layer_idx)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int) -> None:
        self._cache.keep_inputs(conv_states, layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        past = self._cache.get_recurrent_state(layer_idx)
        return past if past is None or self._bias is None else past + self._bias

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int) -> None:
        kept = recurrent_states if self._bias is None else recurrent_states - self._bias
        self._cache.update_recurrent_state(kept, layer_idx)
