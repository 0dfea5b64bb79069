"""Rotary frequencies that do not depend on data: capture takes those that positions alone decide."""

import torch

from ..errors import CaptureError, reading


def settle_frequencies(model: torch.nn.Module, place: str) -> None:
    """Keep a model from choosing its rotary frequencies while it runs, where it has but one choice; in place.

    Raises:
        CaptureError: the length of the text decides on them.
    """
    for module in model.modules():
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        if kinds is None or config is None:
            continue
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            with reading(place, "its rope_parameters are incomplete", kind=CaptureError):
                given = config.rope_parameters if layer is None else config.rope_parameters[layer]
                # Of an encoder of pictures there is none, and its frequencies are always the same.
                _check(kind, given, getattr(config, "max_position_embeddings", 0), place)
        # The frequencies of short texts are those it begins with.
        module.__dict__["rope_type"] = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _check(kind: str, given: dict, longest: int, place: str) -> None:
    if kind == "longrope":
        short = given["original_max_position_embeddings"]
        if longest <= short:
            return
        remedy = (
            f'For texts of up to {short} tokens set max_position_embeddings to {short} in config.json, and "factor" in '
            f"its rope_parameters to {given.get('factor') or longest / short:g}"
        )
    elif "dynamic" in kind:
        remedy = f'For texts of up to {longest} tokens set rope_type to "default" in config.json'
    else:
        return
    raise CaptureError(
        f"its rotary frequencies depend on the length of the text (rope_type {kind})", place=place, remedy=remedy
    )
