"""Orders of features as text, for manifests: which feature of the float model is in each place of a file's value."""

import base64
import binascii

import numpy as np


def packed(order: np.ndarray) -> str:
    """The numbers 0 to n - 1 in some order, as Base64 of two or four bytes each, little-endian."""
    size = "<u2" if len(order) <= 1 << 16 else "<u4"
    return base64.b64encode(np.asarray(order).astype(size).tobytes()).decode("ascii")


def unpacked(text: str, n: int) -> np.ndarray:
    """The same as int64 [n].

    Raises:
        ValueError: it is no order of n features.
    """
    try:
        data = base64.b64decode(text, validate=True)
        order = np.frombuffer(data, "<u2" if len(data) == 2 * n else "<u4").astype(np.int64)
    except (binascii.Error, ValueError):
        order = np.empty(0, np.int64)
    if not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"no order of {n} features")
    return order
