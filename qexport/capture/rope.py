"""Rotary frequencies as functions of positions: what a model's code decides while it runs is part of its graph."""

from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import CaptureError, reading

_Choose = Callable[[Tensor], Tensor]  # frequencies, by how long the longest text of a call is


def settle_frequencies(model: torch.nn.Module, place: str) -> None:
    """Keep a model from changing its rotary frequencies while it runs, in place.

    Where the length of the text decides on them they are computed in every call, from its largest position: short and
    long factors of longrope, and the base of dynamic NTK. transformers keeps those of a longer text before; a graph
    keeps nothing, so a text has the frequencies of its own length.

    Raises:
        CaptureError: its rope_parameters are incomplete.
    """
    for module in model.modules():
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        if kinds is None or config is None:
            continue
        chosen: dict[str | None, _Choose] = {}
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            with reading(place, "its rope_parameters are incomplete", kind=CaptureError):
                given = config.rope_parameters if layer is None else config.rope_parameters[layer]
                if kind == "longrope" and _longest(config) > given["original_max_position_embeddings"]:
                    chosen[layer] = _of_two(module, layer, given["original_max_position_embeddings"])
                elif "dynamic" in (kind or ""):
                    chosen[layer] = _of_longer_base(module, layer, given)
        if chosen:
            _choose_in_calls(module, chosen)
        # The frequencies of short texts are those it begins with.
        module.__dict__["rope_type"] = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def longest_text(config) -> int | None:
    """Tokens that a dynamic base is meant for, which are more than the config's positions; None for any other kind."""
    given = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (given, *given.values()) if isinstance(part, Mapping)]
    factors = [part["factor"] for part in parts if "dynamic" in str(part.get("rope_type", "")) and "factor" in part]
    return int(_longest(config) * max(factors)) if factors else None


def _longest(config) -> int:
    """Of an encoder of pictures there is none, and its frequencies are always the same."""
    return getattr(config, "max_position_embeddings", None) or 0


def _buffer(layer: str | None) -> str:
    return "inv_freq" if layer is None else f"{layer}_inv_freq"


def _choose_in_calls(module: torch.nn.Module, chosen: Mapping[str | None, _Choose]) -> None:
    plain = module.forward

    def forward(x, position_ids, layer_type=None, **others):
        more = others if layer_type is None else {"layer_type": layer_type, **others}
        if layer_type not in chosen:
            return plain(x, position_ids, **more)
        frequencies = chosen[layer_type](position_ids.amax() + 1)
        with patch.dict(module._buffers, {_buffer(layer_type): frequencies}):
            return plain(x, position_ids, **more)

    module.forward = forward


def _of_two(module, layer: str | None, short: int) -> _Choose:
    """longrope (Ding et al., "LongRoPE", arXiv 2402.13753): other factors for all positions of texts beyond `short`."""
    made, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, seq_len=short + 1, layer_type=layer)
    before = getattr(module, _buffer(layer)).clone()
    return lambda length: torch.where(length > short, made.to(before), before)


def _of_longer_base(module, layer: str | None, given: Mapping) -> _Choose:
    """Dynamic NTK: a base that grows with the text, once it is longer than the config's positions."""
    width, longest = 2 * getattr(module, _buffer(layer)).numel(), _longest(module.config)
    theta, factor = float(given["rope_theta"]), float(given["factor"])

    def choose(length: Tensor) -> Tensor:
        length = torch.clamp(length, min=longest).float()
        base = theta * (factor * length / longest - (factor - 1)) ** (width / (width - 2))
        return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)

    return choose
