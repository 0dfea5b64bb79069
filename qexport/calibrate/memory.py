"""Memory given back to the system between blocks."""

import ctypes
import sys
from functools import cache


def trim() -> None:
    """Return freed memory that the C library keeps.

    glibc serves tensors of up to 32 MB from heaps that fragment: without this, memory that no tensor uses piles up
    block by block, as much as half of the weights of a block each time. Elsewhere nothing happens.
    """
    if (release := _malloc_trim()) is not None:
        release(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
