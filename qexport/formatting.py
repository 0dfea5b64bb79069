"""Numbers as people read and write them."""

import re

from .errors import InputError


def megabytes(count: int) -> str:
    """A size for people: `66.4 MB`, with kB and GB where those are easier to read."""
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def parsed_bytes(text: str) -> int:
    """The number of bytes in `90MB`, `1.5 GB`, `86300000`: powers of 1000, as `megabytes` prints them.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmg]?)b?", text.strip().lower())
    if found is None:
        raise InputError(f"not a size: {text!r}", remedy="Give bytes, or a number with kB, MB or GB")
    return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]])
