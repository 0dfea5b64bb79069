"""Tokens of texts, cut into windows: each text alone, or many packed one behind the other."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

# Characters tokenized at once: some tokenizers take time quadratic in the length of a string, and warn of long ones.
# A cut at the end of a line changes hardly a token.
_PIECE = 16384
MORE = "Give more text or a smaller sequence_length"


def text_windows(text: str, tokenizer: Any, length: int, *, place: str, remedy: str) -> Tensor:
    """All windows of a text that do not overlap, in order; what is left at the end is dropped.

    Args:
        length: tokens in a window, with what the tokenizer puts before a text.
        place, remedy: of the errors.

    Returns:
        int64 [n, length].

    Raises:
        InputError: no text, or fewer tokens than one window.
    """
    start = start_ids(tokenizer)
    body = length - len(start)
    if body < 1:
        raise InputError(f"{length} tokens leave no room after the {len(start)} that begin every text")
    windows = _cut(_tokens(text, tokenizer, place), body, place, remedy)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)


def text_tokens(text: str, tokenizer: Any, place: str) -> np.ndarray:
    """The ids of a text of any length, with what the tokenizer puts before it.

    Raises:
        InputError: no text; `place` says where.
    """
    return np.concatenate([np.asarray(start_ids(tokenizer), dtype=np.int64), _tokens(text, tokenizer, place)])


def packed_windows(
    documents: Iterable[Any], tokenizer: Any, length: int, *, place: str, remedy: str, enough: int | None = None
) -> Tensor:
    """Documents one behind the other with the tokenizer's end of text between, cut into full windows.

    Args:
        documents: ids of each; only as many are read as it takes.
        length: tokens in a window.
        enough: windows that will do; None for all.
        place, remedy: of the errors.

    Returns:
        int64 [n, length].

    Raises:
        InputError: the tokenizer has no end of text, or there are fewer tokens than one window.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no token for the end of a text", place=place, remedy="Set packed: false")
    parts: list[np.ndarray] = []
    have = 0
    for document in documents:
        part = np.asarray(document, dtype=np.int64)
        ended = len(part) and part[-1] == tokenizer.eos_token_id
        parts.append(part if ended else np.append(part, tokenizer.eos_token_id))
        have += len(parts[-1])
        if enough is not None and have >= enough * length:
            break
    ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return _cut(ids, length, place, remedy)[:enough]


def start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(plain) + 1):
        if plain and full[begin : begin + len(plain)] == plain:
            return list(full[:begin])
    return []


def _tokens(text: str, tokenizer: Any, place: str) -> np.ndarray:
    if not text.strip():
        raise InputError("it holds no text", place=place)
    found = tokenizer(_pieces(text), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in found])


def _cut(ids: np.ndarray, body: int, place: str, remedy: str) -> Tensor:
    count = len(ids) // body
    if not count:
        raise InputError(f"its {len(ids)} tokens are fewer than one sample of {body}", place=place, remedy=remedy)
    return torch.from_numpy(ids[: count * body].reshape(count, body))


def _pieces(text: str) -> list[str]:
    pieces, begin = [], 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            for mark in ("\n", " "):
                cut = text.rfind(mark, begin + 1, end)
                if cut > 0:
                    # Tokens take the space before a word with them, and the newline after a line.
                    end = cut + (mark == "\n")
                    break
        pieces.append(text[begin:end])
        begin = end
    return pieces
