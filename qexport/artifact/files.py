"""Small files that people bring or edit, read whole: bounded in size, and every fault of theirs is one sentence."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

MOST_JSON = 64 << 20  # bytes: larger than any config or report, smaller than what would fill memory as objects
DEEPEST = 64  # objects and lists within each other


def link_or_copy(source: Path, target: Path) -> None:
    """Let a new file be the same bytes as another: a hard link, or a copy where the file system has none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def read_text(path: Path, most: int, remedy: str | None = None) -> str:
    """A UTF-8 file, with or without a byte order mark.

    Args:
        most: bytes; remedy: of every error.

    Raises:
        InputError: no such file or no regular one, larger than `most`, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device would be read for ever.
            raise InputError("is not a file", place=str(path), remedy=remedy)
        if path.stat().st_size > most:
            raise InputError(f"is larger than {most:,} bytes", place=str(path), remedy=remedy)
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"byte {error.start} is not UTF-8", place=str(path), remedy=remedy) from None
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {said}", place=str(path), remedy=remedy) from None


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; numbers may be NaN and Infinity, which Python writes into JSON.

    Raises:
        InputError: as `read_text`, or no JSON object, or one too deep.
    """
    text = read_text(path, MOST_JSON, remedy)
    try:
        data = json.loads(text)
        check_depth(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"unreadable: {error}", place=str(path), remedy=remedy) from None
    if not isinstance(data, dict):
        raise InputError("not a JSON object", place=str(path), remedy=remedy)
    return data


def check_depth(data: Any) -> None:
    """Raises ValueError where objects and lists are more than DEEPEST deep: what walks them would run out of stack."""
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} objects and lists within each other")


def not_finite(data: Any, path: tuple = ()) -> tuple | None:
    """The path of the first NaN or Infinity in JSON data, or None."""
    if isinstance(data, float):
        return None if math.isfinite(data) else path
    pairs = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    return next((found for key, value in pairs if (found := not_finite(value, (*path, key))) is not None), None)
