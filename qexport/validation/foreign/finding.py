"""Which ONNX file is meant, who wrote it, and how its own runtime opens it."""

from dataclasses import dataclass, field
from pathlib import Path

import onnx

from ...artifact import manifest as manifests
from ...artifact.checksums import MANIFEST_FILE
from ...artifact.manifest import CPU, GENAI_FILE, MODEL_FILE
from ...errors import InputError, reading

_ONNX = ".onnx"


@dataclass(frozen=True)
class ForeignFile:
    """An ONNX file of another tool.

    Attributes:
        path: the file; tool: what it says wrote it.
        session: session config entries that its folder asks for; provider: execution provider it was made for.
    """

    path: Path
    tool: str
    session: dict[str, str] = field(default_factory=dict)
    provider: str = CPU


def is_foreign(place: Path) -> bool:
    """Whether this is an ONNX file, or a folder with one, that qexport did not write."""
    folder = place if place.is_dir() else place.parent
    if (folder / MANIFEST_FILE).is_file():
        return False
    return bool(_files(place)) if place.is_dir() else place.is_file() and place.suffix == _ONNX


def find_file(place: Path) -> ForeignFile:
    """The file that a path means.

    Raises:
        InputError: a folder with several files of which none is named, or a file that is no ONNX model.
    """
    path, session, provider = place, {}, CPU
    folder = place if place.is_dir() else place.parent
    if (folder / GENAI_FILE).is_file():
        said = manifests.load_genai(folder)
        named = folder / said.settings["filename"]
        session, provider = said.session, said.provider
        path = named if place.is_dir() else place
    elif place.is_dir():
        path = _only(place)
    with reading(path, "no ONNX model", remedy="Give the .onnx file or its folder"):
        model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise InputError("is not an ONNX model, or is empty", place=str(path), remedy="Give another file")
    tool = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    return ForeignFile(path, tool or "a tool that does not say its name", session, provider)


def _files(folder: Path) -> list[Path]:
    """ONNX files of a folder; where it has none, those of its folder "onnx", as models on the Hub have it."""
    return sorted(folder.glob(f"*{_ONNX}")) or sorted((folder / "onnx").glob(f"*{_ONNX}"))


def _only(folder: Path) -> Path:
    found = _files(folder)
    if len(found) == 1:
        return found[0]
    if any(path.name == MODEL_FILE for path in found):
        return next(path for path in found if path.name == MODEL_FILE)
    names = ", ".join(path.name for path in found[:5]) + (" and more" if len(found) > 5 else "")
    raise InputError(f"has {len(found)} ONNX files: {names}", place=str(folder), remedy="Give the path of one of them")
