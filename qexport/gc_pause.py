"""Python's collector of reference cycles, kept out of work that makes many objects and little garbage."""

import gc
from contextlib import contextmanager


@contextmanager
def no_garbage_collection():
    """Do not look for cycles: importing and tracing make millions of objects that live on, and each look costs."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
