"""Adapters beside an export: what ONNX Runtime and onnxruntime-genai load and switch, one file each."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import InputError, reading

SUFFIX = ".onnx_adapter"
_VERSION = 1


def adapter_path(folder: Path, name: str, known: tuple[str, ...]) -> Path:
    """Where an adapter of an export lies.

    Raises:
        InputError: the export has none of that name.
    """
    if name not in known:
        raise InputError(
            f"has no adapter {name}", place=str(folder),
            remedy=f"It has {', '.join(known)}" if known else "Export it with --adapter NAME=DIR",
        )  # fmt: skip
    return folder / f"{name}{SUFFIX}"


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors by the names of the inputs that they are for."""
    made = ort.AdapterFormat()
    made.set_adapter_version(_VERSION)
    made.set_model_version(_VERSION)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    made.set_parameters(values)
    made.export_adapter(str(path))


def read_adapter(path: Path) -> dict[str, ort.OrtValue]:
    """The tensors by the names of their inputs.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading(path, "cannot be read", remedy="Export the model again"):
        if not path.is_file():
            raise InputError("is missing", place=str(path), remedy="Export the model again")
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: ort.OrtValue.ortvalue_from_numpy(value.numpy().copy()) for name, value in found.items()}
