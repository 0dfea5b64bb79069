"""Transformers' attention redirected to one graph node, and a cache that is a plain list of tensors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from ..errors import CaptureError
from ..graph.ops.attention import MASKED
from .kept import CONV, INDEXER, KEY, RECURRENT, SUMMED, VALUE, state
from .states import Asked, GraphStateLayer, asked

IMPLEMENTATION = "qexport"
_PROBE = 12  # positions in a row on which a mask pattern is compared with a known one


class GraphCacheLayer(DynamicLayer):
    """Past keys and values of one layer; of a layer whose keys are its values too, the keys alone.

    `update` returns past and new ones together, for a model that does with them what it likes. Attention that is handed
    exactly these takes `new` instead: then concatenating belongs to the attention node, so that a target can choose how
    the cache is kept. Lengths come from the past alone.

    Attributes:
        new: keys and values of the new tokens; None before `update`.
        present: what the cache holds then; None before `update`.
        rows: what else it keeps of every token, by role [batch, 1, past, features]; behind `update_rows` of all.
    """

    indexer_position_ids = None  # of a model that asks here how far keys of past tokens are turned

    def __init__(
        self, key: torch.Tensor, value: torch.Tensor | None, rows: Mapping[str, torch.Tensor] = MappingProxyType({})
    ):
        super().__init__()
        self.past_key, self.past_value, self.rows = key, key if value is None else value, dict(rows)
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.present: list[torch.Tensor] | None = None
        self.keys, self.values, self.is_initialized = key, self.past_value, True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.new is not None:
            raise CaptureError("one layer updates its cache twice")
        self.new = key_states, value_states
        self.keys = self.values = torch.cat([self.past_key, key_states], dim=2)
        self.present = [self.keys]
        if self.past_value is not self.past_key:
            self.values = torch.cat([self.past_value, value_states], dim=2)
            self.present = [self.keys, self.values]
        return self.keys, self.values

    def update_rows(self, new: torch.Tensor, role: str) -> torch.Tensor:
        """What is kept of past and new tokens; of the new ones it is [batch, new, features], and so of all."""
        if role not in self.rows:
            raise CaptureError(f"a layer that keeps no {role} of tokens updates it")
        self.rows[role] = torch.cat([self.rows[role], new[:, None]], dim=2)
        return self.rows[role][:, 0]

    def get_seq_length(self) -> int:
        return self.past_key.shape[2]

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.past_key.shape[2] + query_length, 0


def unknown_state(what: str) -> CaptureError:
    """A layer of the model keeps something that has no place in a file's interface."""
    return CaptureError(
        f"a layer keeps {what}: only keys, values, keys of an indexer, and states of convolutions and recurrences are "
        "known",
        remedy="A state of another kind cannot be lowered",
    )


class _FromTheFirstToken(Cache):
    """A cache that looks as in front of a text."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: a model with nothing to look up takes the way of a prompt."""


class GraphCache(_FromTheFirstToken):
    """The cache handed to a Hugging Face model while it is traced.

    Args:
        past: of each layer what it keeps, by role (see `kept`).
    """

    def __init__(self, past: Sequence[Mapping[str, torch.Tensor]]):
        rows = [{role: of[role] for role in (INDEXER, SUMMED) if role in of} for of in past]
        self.attended = [
            GraphCacheLayer(of[KEY], of.get(VALUE), more) if KEY in of else None
            for of, more in zip(past, rows, strict=True)
        ]
        self.states = [GraphStateLayer(of) for of in past]
        layers: list[Any] = [keys or state for keys, state in zip(self.attended, self.states, strict=True)]
        super().__init__(layers=layers)

    def present(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for number, (keys, states) in enumerate(zip(self.attended, self.states, strict=True)):
            rows = [] if keys is None else list(keys.rows.values())
            for made in ([] if keys is None else keys.present, rows, states.present):
                if made is None:
                    raise CaptureError(f"the model never updated the cache of layer {number}")
                found += made
        return found

    def update_indexer(self, indexer_key_states, layer_idx, **kwargs):
        return self.update_rows(indexer_key_states, layer_idx, INDEXER)

    def update_rows(self, new: torch.Tensor, layer_idx: int, role: str) -> torch.Tensor:
        """What is kept of past and new tokens, beside keys and values; see `GraphCacheLayer`."""
        layer = self.attended[layer_idx]
        if layer is None:
            raise CaptureError(f"a layer that keeps no keys keeps {role} of tokens")
        return layer.update_rows(new, role)

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, **kwargs):
        return self.states[layer_idx].update_conv(conv_states, state_idx)

    def past_inputs(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of a convolution of the layer themselves, for code that joins them with new ones."""
        return self.states[layer_idx].past(CONV, state_idx)

    def keep_inputs(self, last: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        """Those behind the new tokens, from such code."""
        self.states[layer_idx].replace(CONV, last, state_idx)

    def get_recurrent_state(self, layer_idx, state_idx=0):
        past = self.states[layer_idx].past(RECURRENT, state_idx)
        asked.set(Asked(past))
        return past

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        return self.states[layer_idx].replace(RECURRENT, recurrent_states, state_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._first_of_keys(layer_idx).get_seq_length()

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self._first_of_keys(layer_idx).get_mask_sizes(query_length)

    def _first_of_keys(self, index: int) -> GraphCacheLayer:
        """A layer that keeps keys and values: this one, or the first one where it does not."""
        found = [layer for layer in (self.attended[index], *self.attended) if layer is not None]
        if not found:
            raise CaptureError("no layer of the model keeps keys and values, which tell how long its text is")
        return found[0]


class ProbeCache(_FromTheFirstToken):
    """An empty cache that keeps nothing, and notes what a model puts into it.

    Attributes:
        found: by number of the layer an example of every tensor that it keeps, by role.

    Args:
        depth: layers that the cache has before anything is put into it.
    """

    def __init__(self, depth: int = 0):
        nothing = torch.empty(0, 0, 0, 0)
        super().__init__(layers=[GraphCacheLayer(nothing, nothing) for _ in range(depth)])
        self.found: dict[int, dict[str, torch.Tensor]] = {}

    def _note(self, layer_idx: int, **tensors: torch.Tensor) -> None:
        self.found.setdefault(layer_idx, {}).update(tensors)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self._note(layer_idx, key=key_states, **({} if value_states is key_states else {VALUE: value_states}))
        return key_states, value_states

    def _note_state(self, layer_idx: int, role: str, tensor: torch.Tensor) -> None:
        if role in self.found.get(layer_idx, ()):
            raise unknown_state("one state for several convolutions or recurrences")
        self._note(layer_idx, **{role: tensor})

    def update_indexer(self, indexer_key_states, layer_idx, **kwargs):
        return self.update_rows(indexer_key_states, layer_idx, INDEXER)

    def update_rows(self, new: torch.Tensor, layer_idx: int, role: str) -> torch.Tensor:
        """The new ones, as in front of a text."""
        self._note(layer_idx, **{role: new[:, None]})
        return new

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, conv_kernel_size=None, **kwargs):
        if conv_kernel_size is None:
            raise unknown_state("inputs of a convolution of no stated width")
        inputs = conv_states.new_zeros((*conv_states.shape[:2], conv_kernel_size - 1))
        self._note_state(layer_idx, state(CONV, state_idx), inputs)
        return conv_states

    def past_inputs(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, as in front of a text."""

    def keep_inputs(self, last: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        self._note_state(layer_idx, state(CONV, state_idx), last)

    def get_recurrent_state(self, layer_idx, state_idx=0):
        asked.set(Asked(None))

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        self._note_state(layer_idx, state(RECURRENT, state_idx), recurrent_states)
        return recurrent_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class _GivenLayer(DynamicLayer):
    """Keys and values that are there and stay as they are."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True

    def get_seq_length(self) -> int:
        return 1  # transformers asks whether there is anything; the true length would be a condition on a size


class GivenCache(Cache):
    """What a decoder's cross-attention reads: keys and values of the source, a list in pairs."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__(layers=[_GivenLayer(k, v) for k, v in zip(given[::2], given[1::2], strict=True)])


_cache: ContextVar[Cache | None] = ContextVar("cache", default=None)
_given: ContextVar[Cache | None] = ContextVar("given", default=None)


@contextmanager
def tracing(cache: Cache, given: Cache | None = None):
    """Name the caches that attention calls inside the `with` belong to: transformers does not hand them over."""
    tokens = _cache.set(cache), _given.set(given)
    try:
        yield cache
    finally:
        _cache.reset(tokens[0])
        _given.reset(tokens[1])


def current_cache() -> Any:
    """The cache of the call that is traced, for code that is not handed it."""
    return _cache.get()


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    cache, given = _cache.get(), _given.get()
    if isinstance(attention_mask, _Refused):
        raise attention_mask.error()
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    softcap, sinks, bias = float(softcap or 0.0), kwargs.get("s_aux"), kwargs.get("position_bias")
    if given is not None and any(layer.keys is key for layer in given.layers):
        padding = attention_mask.padding if isinstance(attention_mask, _Unhidden) else attention_mask
        return _across(query, key, value, padding, bias, scale, softcap, sinks), None
    if isinstance(attention_mask, _Unhidden):
        raise CaptureError("its tokens attend to later ones, so it cannot generate with a cache")
    if cache is None or attention_mask is None:
        raise CaptureError("attention outside a decoder layer with a cache and a mask", place=type(module).__name__)
    if bias is not None:
        attention_mask = attention_mask + bias
    if (chosen := kwargs.get("indices")) is not None:
        attention_mask = _without_others(attention_mask, chosen)
    kept = (at for at in cache.layers if isinstance(at, GraphCacheLayer))
    layer = next((at for at in kept if at.new and at.keys is key and at.values is value), None)
    if (of_queries := kwargs.get("sinks")) is not None or layer is None or layer.present[0] is not key:
        sinks = sinks if of_queries is None else of_queries
        return _written_out(query, key, value, attention_mask, scale, softcap, sinks), None
    out, *made = torch.ops.qexport.cached_attention(
        query, *layer.new, layer.past_key, layer.past_value, attention_mask, scale, softcap, sinks
    )
    layer.present = made[: len(layer.present)]
    return out, None


def _without_others(mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mask of attention with all keys hidden that were not chosen.

    Args:
        mask: additive, [batch, 1, new, total]; chosen: places of keys, integers [batch, new, at most total].
    """
    found = torch.zeros_like(mask).scatter(-1, chosen.long()[:, None], 1.0)
    return torch.where(found > 0, mask, MASKED)


def _across(query, key, value, mask, bias, scale: float, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention of a decoder's tokens on its source.

    Args:
        mask, bias: added to the scores; None for nothing.
    """
    if mask is not None and bias is None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    elif bias is not None:
        mask = bias if mask is None else mask + bias
    if softcap or sinks is not None:
        return _written_out(query, key, value, 0.0 if mask is None else mask, scale, softcap, sinks)
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


def _written_out(query, key, value, mask, scale: float, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention on keys and values that are not one layer's cache as it is, in plain operators.

    Args:
        sinks: a score that takes its share of the softmax and has no value, [heads], or of each query [batch, heads,
            sequence, 1].
    """
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (
            t[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(t.shape[0], query.shape[1], t.shape[2], t.shape[3])
            for t in (key, value)
        )
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        # The score of the first key times zero has the shape wanted, whatever it is.
        column = sinks if sinks.dim() == 4 else scores[..., :1] * 0.0 + sinks.reshape(1, -1, 1, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous()


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
    if _is_pattern(mask_function, _everything):
        if attention_mask is None:
            return _Unhidden(None)
        return _Unhidden(torch.where(attention_mask.bool()[:, None, None, :], 0.0, MASKED))
    window, chunk = _window_of(mask_function, local_size), 0
    if window is None and local_size and _is_chunked(mask_function, local_size):
        window, chunk = 0, local_size
    if window is None:
        return _Refused("the attention mask is neither causal nor a sliding window nor in chunks")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, q_offset + q_length, dtype=torch.int64)
    return torch.ops.qexport.causal_mask(attention_mask, q_offset, window, chunk)


@dataclass(frozen=True)
class _Refused:
    """In the place of a mask that has no lowering: some models make masks that no layer of theirs reads."""

    why: str

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Arithmetic of a model that adds masks to scores itself."""
        raise next(arg for arg in args if isinstance(arg, cls)).error()

    def error(self) -> CaptureError:
        return CaptureError(self.why, remedy="Prefix and two-sided masks cannot be lowered in decoders")


@dataclass(frozen=True)
class _Unhidden:
    """A mask that hides padding alone: [batch, 1, 1, keys], added to the scores; None where there is no padding."""

    padding: torch.Tensor | None


def _window_of(mask_function, local_size: int | None) -> int | None:
    """The sliding window of a causal mask function of transformers, 0 for no limit; None for any other function."""
    causal = (size for size in (0, local_size or 0) if _is_pattern(mask_function, partial(_causal, size), size))
    return next(causal, None)


def _is_pattern(mask_function, pattern: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *edges: int) -> bool:
    """Whether a mask function of transformers shows the same keys as a pattern.

    They are compared on a few positions from 0 on, and on a few around each of the edges.
    """
    with _disable_current_modes():
        places = torch.arange(_PROBE)
        places = torch.cat([places, *(places + edge - _PROBE // 2 for edge in edges)]).clamp(min=0).unique()
        query, key = places[:, None], places[None, :]
        try:
            got = mask_function(torch.tensor(0), torch.tensor(0), query, key)
            return torch.equal(torch.as_tensor(got).expand(len(places), len(places)), pattern(query, key))
        except Exception:  # it reads more than positions: a tensor of the model, or sizes of its inputs
            return False


def _is_chunked(mask_function, size: int) -> bool:
    """Whether it is causal attention in chunks that are counted from the number of padding tokens that it holds."""

    def pattern(lead: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & ((key - lead) // size == (query - lead) // size)

    with _disable_current_modes():
        held = [(lead, _holding(mask_function, lead)) for lead in (0, 3)]
    return all(_is_pattern(mask, partial(pattern, lead), size, size + lead, 2 * size) for lead, mask in held)


def _holding(function: Callable, value: int) -> Callable:
    """A function whose closures hold this number in the place of tensors, which have no values while it is traced."""

    def held(content: Any) -> Any:
        if isinstance(content, torch.Tensor):
            return torch.tensor([value])
        if isinstance(content, tuple):
            return tuple(map(held, content))
        return _holding(content, value) if isinstance(content, FunctionType) else content

    cells = tuple(CellType(held(cell.cell_contents)) for cell in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _everything(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query >= 0) & (key >= 0)


def _causal(window: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    seen = key <= query
    return seen & (key > query - window) if window else seen


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
