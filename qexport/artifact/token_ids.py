"""Ids of special tokens, as config.json and generation_config.json name them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

# Keys of one id, of one or several, of several, of pairs of a position and an id that may be open, and of ids by names.
_ONE, _SOME = ("pad_token_id", "decoder_start_token_id", "no_timestamps_token_id"), ("bos_token_id", "eos_token_id")
_NAMED = ("lang_to_id", "task_to_id")
_LISTS, _PAIRS = ("suppress_tokens", "begin_suppress_tokens"), "forced_decoder_ids"
_MOST = 2**31 - 1


def check_token_ids(said: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where an id of a special token that a config names is none."""
    for key in (*_ONE, *_SOME, *_LISTS, _PAIRS, *_NAMED):
        value = said.get(key)
        if value is None:
            continue
        if key in _ONE or (key in _SOME and not isinstance(value, list)):
            wrong = not _is_id(value)
        elif key in _NAMED:
            wrong = not isinstance(value, dict) or not all(map(_is_id, value.values()))
        elif key == _PAIRS:
            wrong = not isinstance(value, list) or not all(_is_pair(pair) for pair in value)
        else:
            wrong = not isinstance(value, list) or not all(map(_is_id, value))
        if wrong:
            raise InputError(f"{key} is not a token id: {str(value)[:40]!r}", place=str(path), remedy="Correct it")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= _MOST


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_id(value[0]) and (value[1] is None or _is_id(value[1]))
