"""Attention in windows with tokens that see everything (Longformer, LED) as one attention with a mask.

Transformers cuts a text into pieces as long as a window, pads it to a multiple of them, and gathers the tokens with
global attention, as many as there are. A graph has no such sizes. Beltagy et al., "Longformer: The Long-Document
Transformer", arXiv 2004.05150, say what it computes: a token sees those no farther than half a window and the global
ones; a global one sees all, by projections of its own. Here every token has both kinds of features side by side, the
global half of a local query is zero and the other way round, so that one product has the scores of both kinds. It costs
the square of the length, and the global projections of every token, where transformers' costs length times window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..graph.ops.attention import MASKED

_PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")
_WINDOW, _PADS = "one_sided_attn_window_size", "_pad_to_window_size"


@contextmanager
def windows_as_masks(model: torch.nn.Module) -> Iterator[None]:
    """Let the windowed attention of a model compute with masks, on texts of any length."""
    changed: list[tuple[Any, str]] = []
    for part in model.modules():
        if all(hasattr(part, name) for name in (*_PROJECTIONS, _WINDOW)):
            changed.append((part, "forward"))
            part.forward = _attention_of(part)
        if hasattr(part, _PADS):
            changed.append((part, _PADS))
            setattr(part, _PADS, _unpadded)
    try:
        yield
    finally:
        for part, name in changed:
            delattr(part, name)


def _attention_of(part: Any) -> Callable[..., tuple[Tensor]]:
    def forward(hidden_states: Tensor, **masks: Any) -> tuple[Tensor]:
        return _attend(part, hidden_states, masks["is_index_masked"], masks["is_index_global_attn"])

    return forward


def _unpadded(**given: Any) -> tuple[Any, ...]:
    """No padding, and all that would have been padded as it is."""
    return (0, *(value for name, value in given.items() if name != "pad_token_id"))


def _attend(module: Any, hidden_states: Tensor, padding: Tensor, everywhere: Tensor) -> tuple[Tensor]:
    """Attention of tokens.

    Args:
        module: has the projections and the window.
        hidden_states: [batch, sequence, features].
        padding, everywhere: bool [batch, sequence], what is padding and which tokens have global attention.
    """
    rows, length, _ = hidden_states.shape

    def heads(name: str) -> Tensor:
        return getattr(module, name)(hidden_states).view(rows, length, module.num_heads, -1).transpose(1, 2)

    sees_all = everywhere[:, None, :, None]
    near, far = heads("query"), heads("query_global")
    query = torch.cat([torch.where(sees_all, 0.0, near), torch.where(sees_all, far, 0.0)], -1)
    key, value = (torch.cat([heads(name), heads(f"{name}_global")], -1) for name in ("key", "value"))
    places = torch.arange(length, device=hidden_states.device)
    window = (places[:, None] - places).abs() <= getattr(module, _WINDOW)
    seen = (window | sees_all | everywhere[:, None, None, :]) & ~padding[:, None, None, :]
    both = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.where(seen, 0.0, MASKED), scale=module.head_dim**-0.5
    )
    near, far = both.chunk(2, -1)
    return (torch.where(sees_all, far, near).transpose(1, 2).reshape(rows, length, -1),)
