"""Documents, texts or conversations, as calibration sequences."""

from collections.abc import Iterable
from typing import Any

from ...errors import InputError
from ...recipe.recipe import CalibrationSpec
from .chat import conversation_ids
from .samples import Samples, of_rows, spread, whole
from .text import MORE, packed_windows, text_tokens, text_windows


def document_ids(tokenizer: Any, document: Any, place: str) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer gives it, or of a conversation.

    Raises:
        InputError: it holds no text, or the chat template refuses it.
    """
    if not isinstance(document, str):
        return conversation_ids(tokenizer, document, place)
    ids = list(tokenizer(document, verbose=False)["input_ids"])
    if not ids or not document.strip():
        raise InputError("it holds no text", place=place)
    return ids


def spread_windows(text: str, name: str, spec: CalibrationSpec, tokenizer: Any) -> Samples:
    """spec.samples windows of one text, spread over it, or all where there are fewer."""
    if spec.packed:  # of one text: it begins once, and not in every window
        ids = text_tokens(text, tokenizer, name)
        found = packed_windows([ids], tokenizer, spec.sequence_length, place=name, remedy=MORE)
    else:
        found = text_windows(text, tokenizer, spec.sequence_length, place=name, remedy=MORE)
    windows = found[spread(len(found), min(spec.samples, len(found)), spec.seed)]
    return whole(windows, f"{len(windows)} windows of {spec.sequence_length} tokens from {name}{_fewer(windows, spec)}")


def rows_of(documents: Iterable[tuple[str, Any]], spec: CalibrationSpec, tokenizer: Any, name: str) -> Samples:
    """spec.samples sequences of documents, in their order: one each, or full windows where they are packed.

    Args:
        documents: where each comes from, for errors, and the document; only as many are read as it takes.
        name: of them all.
    """
    found = (document_ids(tokenizer, document, place) for place, document in documents)
    n, length = spec.samples, spec.sequence_length
    if spec.packed:
        windows = packed_windows(found, tokenizer, length, place=name, remedy=MORE, enough=n)
        return whole(windows, f"{len(windows)} windows of {length} tokens packed from {name}{_fewer(windows, spec)}")
    rows = [row[:length] for row, _ in zip(found, range(n), strict=False)]
    if not rows:
        raise InputError("it holds no samples", place=name)
    return of_rows(rows, f"{len(rows)} conversations of up to {{}} tokens from {name}{_fewer(rows, spec)}")


def _fewer(found: Any, spec: CalibrationSpec) -> str:
    return f" (seed {spec.seed})" if len(found) == spec.samples else f" (seed {spec.seed}, {spec.samples} asked for)"
