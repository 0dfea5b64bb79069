"""Models with an adapter for each language (X-MOD), captured with that of one.

Transformers gathers the rows of a batch that are of a language, as many as there are: a size of values. A graph reads
one language, the one that the config has for rows of which nobody says it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..errors import CaptureError

_ADAPTERS, _USE = "adapter_modules", "lang_adapter"


class _Every:
    """In the place of the rows' languages: whichever is asked for, all rows are of it."""

    def __eq__(self, other: object) -> slice:  # type: ignore[override]  # which chooses rows where truth values would
        return slice(None)

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def one_language(model: PreTrainedModel, place: str) -> Iterator[list[str]]:
    """Let a model have the adapters of one language, for all rows.

    Args:
        place: what the user calls the model.

    Yields:
        sentences on what is left out.

    Raises:
        CaptureError: its config names no language, or one that it has no adapter for.
    """
    parts = [part for part in model.modules() if hasattr(part, _ADAPTERS) and hasattr(part, _USE)]
    if not parts:
        yield []
        return
    whole = [getattr(part, _ADAPTERS) for part in parts]
    language, known = str(getattr(model.config, "default_language", None)), list(whole[0])
    if language not in known:
        raise CaptureError(
            f"has adapters for {len(known)} languages, and its config says default_language {language}", place=place,
            remedy=f"Set default_language in config.json to one of {', '.join(known)}",
        )  # fmt: skip
    handles = [part.register_forward_pre_hook(_of_every_row) for part in parts]
    for part, adapters in zip(parts, whole, strict=True):
        setattr(part, _ADAPTERS, torch.nn.ModuleDict({language: adapters[language]}))
    try:
        yield [f"reads {language}, one of {len(known)} languages: the adapters of the others are left out"]
    finally:
        for part, adapters, handle in zip(parts, whole, handles, strict=True):
            setattr(part, _ADAPTERS, adapters)
            handle.remove()


def _of_every_row(_part: torch.nn.Module, given: tuple) -> tuple:
    """What the part is handed, with all rows of its one language in the last place."""
    return (*given[:-1], _Every())
