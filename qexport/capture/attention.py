"""Transformers' attention redirected to one graph node, and a cache that is a plain list of tensors."""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from ..errors import CaptureError

IMPLEMENTATION = "qexport"
_PROBE = 12  # positions on which a mask pattern is compared with causal attention


class GraphCacheLayer(DynamicLayer):
    """Past keys and values of one layer.

    `update` hands the new keys and values through: concatenating belongs to the attention node, so that a target can
    choose how the cache is kept. Lengths come from the past alone.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.past_key, self.past_value, self.present = key, value, None
        self.keys, self.values, self.is_initialized = key, value, True

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.past_key.shape[2]

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.past_key.shape[2] + query_length, 0


class GraphCache(Cache):
    """The cache handed to a Hugging Face model while it is traced."""

    def __init__(self, past: list[torch.Tensor]):
        super().__init__(layers=[GraphCacheLayer(k, v) for k, v in zip(past[::2], past[1::2], strict=True)])

    def present(self) -> list[torch.Tensor]:
        missing = [i for i, layer in enumerate(self.layers) if layer.present is None]
        if missing:
            raise CaptureError(f"the model never updated the cache of layers {missing}")
        return [tensor for layer in self.layers for tensor in layer.present]


_cache: ContextVar[GraphCache | None] = ContextVar("cache", default=None)


@contextmanager
def tracing(cache: GraphCache):
    """Name the cache that attention calls inside the `with` belong to: transformers does not hand it to them."""
    token = _cache.set(cache)
    try:
        yield cache
    finally:
        _cache.reset(token)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise CaptureError(f"attention with {name} has no lowering yet", place=type(module).__name__)
    cache = _cache.get()
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None:
        raise CaptureError("attention outside a decoder layer with a cache", place=type(module).__name__)
    layer = cache.layers[index]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out, *layer.present = torch.ops.qexport.cached_attention(
        query, key, value, layer.past_key, layer.past_value, attention_mask, scale, float(softcap or 0.0)
    )
    return out, None


def _mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    **kwargs,
):
    window = _window_of(mask_function, local_size)
    return torch.ops.qexport.causal_mask(attention_mask, q_offset, window)


def _window_of(mask_function, local_size: int | None) -> int:
    """Which causal pattern a mask function of transformers is, found by evaluating it on a few positions."""
    with _disable_current_modes():
        wide = (local_size or 0) + _PROBE
        index = torch.arange(wide)
        got = mask_function(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
        got = torch.as_tensor(got).expand(wide, wide)
        for window in (0, local_size or 0):
            want = index[None, :] <= index[:, None]
            if window:
                want = want & (index[None, :] > index[:, None] - window)
            if torch.equal(got, want):
                return window
    raise CaptureError(
        "the attention mask is neither causal nor a sliding window",
        remedy="Chunked and prefix masks have no lowering yet",
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
