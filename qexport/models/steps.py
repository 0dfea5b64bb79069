"""How a causal language model of transformers is called with a cache, which models take under different names."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..errors import CaptureError

# What models call their cache. Where a model has none of these, its further arguments would swallow it unread.
_CACHES = ("past_key_values", "cache_params", "state")
WITHOUT_CACHE = (
    "Without a cache it exports as an nn.Module: pass the model, its config.use_cache False, and example inputs"
)
LISTED = "state"  # a list of tensors, which a call returns


def cache_name(model: PreTrainedModel) -> str:
    """The argument that a model takes its cache by.

    Raises:
        CaptureError: it takes none.
    """
    known = inspect.signature(type(model).forward).parameters
    name = next((name for name in _CACHES if name in known), None)
    if name is None:
        raise CaptureError(
            f"{type(model).__name__} does not take a transformers cache", place="forward",
            remedy=f"Models that write a text token by token need one. {WITHOUT_CACHE}",
        )  # fmt: skip
    return name


def step_arguments(model: PreTrainedModel, given: Mapping[str, Tensor], cache: Any) -> dict[str, Any]:
    """Arguments of a call that reads the cache and adds to it.

    Args:
        given: input_ids, attention_mask and position_ids, of which the model gets those that it knows.

    Raises:
        CaptureError: it takes no cache.
    """
    name, read = cache_name(model), dict(given)
    if name != _CACHES[0]:  # models without keys and values, whose masks are of the new tokens alone
        del read["position_ids"]
        read["attention_mask"] = read["attention_mask"][:, -read["input_ids"].shape[1] :]
    if name == LISTED:
        del read["attention_mask"]
    return {**read, name: cache, "use_cache": True}


def first_cache(model: PreTrainedModel) -> Any:
    """What a model reads and fills in front of a text: transformers' cache, or one of a class that its file has.

    None where that class is no cache of transformers': the model makes one, and returns it.
    """
    file = type(model).__module__
    found = (kind for kind in vars(sys.modules[file]).values() if isinstance(kind, type) and kind.__module__ == file)
    own = next((kind for kind in found if kind.__name__.endswith("Cache")), DynamicCache)
    if own is DynamicCache:
        return DynamicCache(config=model.config)
    return type(own.__name__, (_Counted, own), {})() if issubclass(own, DynamicCache) else None


class _Counted(DynamicCache):
    """A cache that knows how many tokens it has where its first layer keeps none: masks are made by that."""

    def _counting(self, layer_idx: int) -> int:
        counted = (getattr(layer, "get_seq_length", None) for layer in self.layers)
        lengths = [count() if count else 0 for count in counted]
        return layer_idx if not lengths or lengths[layer_idx] else lengths.index(max(lengths))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._counting(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._counting(layer_idx))


def without_rescaling(model: PreTrainedModel) -> None:
    """Leave the weights as they are, in place: some models halve those of later layers, and what runs through them, to
    stay in the range of float16."""
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0


class Steps:
    """Calls of a model one after another on one text, each with what the one before left in the cache."""

    def __init__(self, model: PreTrainedModel):
        without_rescaling(model)
        self._model, self._cache = model, first_cache(model)
        self._read: Tensor | None = None  # all tokens so far, where they are read again

    def __call__(self, **given: Tensor) -> Any:
        """What the model returns; given: as `step_arguments` takes it, the mask that of all tokens so far."""
        with torch.no_grad():
            if (name := cache_name(self._model)) != LISTED:
                made = self._model(**step_arguments(self._model, given, self._cache))
                self._cache = made.get(name) if self._cache is None else self._cache
                return made
            # Not with its list: a single token of several rows, it adds to each row the states of all of them.
            new = given["input_ids"]
            self._read = new if self._read is None else torch.cat([self._read, new], 1)
            made = self._model(input_ids=self._read)
            made.logits = made.logits[:, -new.shape[1] :]
            return made
