"""Arrays that people bring in safetensors files."""

from pathlib import Path

import numpy as np

from ..errors import InputError, reading


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, by name; floating point ones as float32.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    from safetensors.numpy import load_file

    with reading(path, "cannot be read as safetensors", "Save what the model's processor makes with safetensors"):
        found = load_file(path)
    if not found:
        raise InputError("holds no tensors", place=str(path), remedy="Save what the model's processor makes there")
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in found.items()}
