"""RWKV's weighted means, and the list of states in which its model keeps them beside the last token of each layer."""

from collections.abc import Sequence

import torch

from ..attention import GraphCache
from ..kept import CONV, RECURRENT
from .registry import stands_for

ops = torch.ops.qexport
# The model's list, by place: last inputs of the feed-forward and of the attention, sums of values and of weights, and
# the logarithm of their scale; each [batch, channels, layers].
_FORWARD, _ATTENTION, *_SUMS = range(5)


@stands_for("rwkv_linear_attention")
def wkv(time_decay, time_first, key, value, state=None, return_state=False):
    """With the arguments and results of transformers' function."""
    past = key.new_zeros((key.shape[0], 3, key.shape[2])) if state is None else torch.stack(list(state), 1)
    out, after = ops.wkv(-torch.exp(time_decay), time_first, key, value, past)
    return out, list(after.unbind(1))


def kept_by_layer(states: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What each layer keeps, of the list that a call without a past returns, by role."""
    layers = range(states[0].shape[-1])
    return [
        {
            CONV: torch.cat([states[part][:, :, layer] for part in (_ATTENTION, _FORWARD)], 1)[..., None],
            RECURRENT: torch.stack([states[part][:, :, layer] for part in _SUMS], 1),
        }
        for layer in layers
    ]


class ListedStates:
    """The states of a `GraphCache` as that list, which the model's code reads and writes by layer."""

    def __init__(self, cache: GraphCache):
        self._cache = cache
        self._parts = [_Part(self, place) for place in (_FORWARD, _ATTENTION, *_SUMS)]
        self._new: list[dict[int, torch.Tensor]] = [{} for _ in cache.states]

    def __getitem__(self, place):
        return self._parts[place]

    def read(self, place: int, layer: int) -> torch.Tensor:
        inputs, sums = (self._cache.states[layer].past(role) for role in (CONV, RECURRENT))
        assert inputs is not None and sums is not None
        if place in _SUMS:
            return sums[:, _SUMS.index(place)]
        width = inputs.shape[1] // 2
        return inputs[:, :width, 0] if place == _ATTENTION else inputs[:, width:, 0]

    def write(self, place: int, layer: int, value: torch.Tensor) -> None:
        new = self._new[layer]
        new[place] = value
        if len(new) == len(self._parts):
            of = self._cache.states[layer]
            of.replace(CONV, torch.cat([new[_ATTENTION], new[_FORWARD]], 1)[..., None])
            of.replace(RECURRENT, torch.stack([new[place] for place in _SUMS], 1))


class _Part:
    """One tensor of the list; what is taken of it is always [:, :, layer]."""

    def __init__(self, states: ListedStates, place: int):
        self._states, self._place = states, place

    def __getitem__(self, index):
        return self._states.read(self._place, index[2])

    def __setitem__(self, index, value):
        self._states.write(self._place, index[2], value)
