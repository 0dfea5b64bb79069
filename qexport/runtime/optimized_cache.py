"""The optimized copy of an export: where it is, and whether it still fits."""

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..artifact import ownership
from ..artifact.manifest import MODEL_FILE, Manifest
from . import processor

FOLDER, KEY_FILE = ownership.COPY, ownership.COPY_KEY
FORMAT = 1


def key_of(folder: Path, manifest: Manifest, provider: str) -> dict[str, Any]:
    """Everything that the optimized graph depends on, in the types of JSON.

    The model is known by size and time of its files: reading gigabytes at every load would cost what the copy saves.
    """
    return {
        "format": FORMAT,
        "onnxruntime": ort.__version__,
        "build": ort.get_build_info(),
        "provider": provider,
        "processor": processor.fingerprint(),
        "graph_optimization_level": ort.SessionOptions().graph_optimization_level.name,
        "session": dict(manifest.session),
        "model": {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob(f"{MODEL_FILE}*"))
        },
    }


def write_key(copy: Path, key: dict[str, Any]) -> None:
    """Finish a copy: what it was made for, and the size of every file."""
    sizes = {path.name: path.stat().st_size for path in sorted(copy.iterdir())}
    text = json.dumps(key | {"files": sizes}, indent=2)
    (copy / KEY_FILE).write_text(text + "\n", encoding="utf-8")


def find(folder: Path, manifest: Manifest, provider: str) -> Path | None:
    """The optimized model of a folder, or None where there is none that fits: made for another ONNX Runtime, provider,
    processor, model or set of session entries, or short of a file."""
    copy = folder / FOLDER
    try:
        key = json.loads((copy / KEY_FILE).read_text(encoding="utf-8"))
        sizes = key.pop("files")
        whole = all((copy / name).stat().st_size == size for name, size in sizes.items())
        fits = whole and key == key_of(folder, manifest, provider)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return copy / MODEL_FILE if fits else None
