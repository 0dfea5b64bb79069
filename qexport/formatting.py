"""Numbers as people read and write them."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from .errors import InputError


def megabytes(count: int) -> str:
    """A size for people: `66.4 MB`, with kB and GB where those are easier to read."""
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    """A time for people: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def parsed_bytes(text: str) -> int:
    """The number of bytes in `90MB`, `1.5 GB`, `86300000`: powers of 1000, as `megabytes` prints them.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmg]?)b?", text.strip().lower())
    if found is None:
        raise InputError(f"not a size: {text!r}", remedy="Give bytes, or a number with kB, MB or GB")
    return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]])


def parsed_share(text: str, place: str) -> float:
    """The share in `5%` or `0.05`.

    Args:
        place: the option, for errors.

    Raises:
        InputError: it is none; numbers above 1 have to say that they are percent.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    share = None if found is None else float(found[1]) / (100 if found[2] else 1)
    if found is None or share is None or (share > 1 and not found[2]):
        raise InputError(f"not a share: {text!r}", place=place, remedy="Give percent, such as 5%, or 0.05")
    return share


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a notebook; whatever is in a cell is text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
