"""What an export wrote, with sizes and hashes: a folder knows its own bytes, and which files in it are not its own."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

FILE = "checksums.json"
FORMAT = 1
MANIFEST_FILE = "manifest.json"
# Validation writes them again, with times in them: they are the export's, and their bytes are nobody's promise.
REWRITTEN = ("README.md", "comparison.html", "report.html", "report.json")
MODEL_FILES = ("manifest.json", "model.onnx", "model.onnx.data")  # what numbers come from
_PIECES, _PIECE = 64, 4096  # of a file, for its sample: at most 256 kB are read
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Files:
    """Contents of checksums.json.

    Attributes:
        files: by path in the folder, with "/": bytes, sha256, and sample, the SHA-256 of pieces from all over the file.
        rewritten: files of the export that are written again later.
    """

    files: Mapping[str, Mapping[str, int | str]]
    rewritten: tuple[str, ...]


def write(folder: Path) -> None:
    """Note everything that is in a finished folder; the same files give the same bytes.

    Raises:
        OSError: as writing does.
    """
    names = [name for name in _walk(folder) if name != FILE]
    files = {name: _entry(folder / name) for name in names if _leaf(name) not in REWRITTEN}
    found = {"format": FORMAT, "files": files, "rewritten": sorted({n for n in names if _leaf(n) in REWRITTEN})}
    (folder / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Files | None:
    """What a folder says of itself; None where it has no such file, or one that qexport did not write."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        files, rewritten = found["files"], found["rewritten"]
        whole = all({"bytes", "sha256", "sample"} <= entry.keys() for entry in files.values())
        if found["format"] == FORMAT and whole and MANIFEST_FILE in files:
            return Files(files, tuple(map(str, rewritten)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def check_sample(folder: Path) -> None:
    """See by size and sample whether the model in a folder is the one that was written; some milliseconds.

    A folder without checksums passes.

    Raises:
        InputError: names the first file that is another one, short or missing.
    """
    _check(folder, lambda entry, path: entry["sample"] == _sample(path))


def check(folder: Path) -> None:
    """See whether every byte of the model in a folder is the one that was written; raises as `check_sample`."""
    _check(folder, lambda entry, path: entry["sha256"] == _sha256(path))


def changed(folder: Path) -> dict[str, str]:
    """What became of files of an export since it was written, by name: "missing", "127 of 4096 bytes" or "other bytes".

    Raises:
        InputError: the folder has no checksums.
    """
    noted = read(folder)
    if noted is None:
        raise InputError(
            f"has no {FILE}, so its files cannot be checked", place=str(folder), remedy="Export the model again"
        )
    found = {name: _difference(entry, folder / name) for name, entry in noted.files.items()}
    return {name: what for name, what in found.items() if what}


def _check(folder: Path, same) -> None:
    noted = read(folder)
    if noted is None:
        return
    for name in MODEL_FILES:
        if name in noted.files and (what := _difference(noted.files[name], folder / name, same)):
            raise InputError(
                f"is not as the export wrote it: {what}", place=str(folder / name),
                remedy="Copy the folder again, or export the model again",
            )  # fmt: skip


def _difference(entry: Mapping, path: Path, same=None) -> str:
    same = same or (lambda entry, path: entry["sha256"] == _sha256(path))
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size:,} of {entry['bytes']:,} bytes"
        return "" if same(entry, path) else "other bytes"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _entry(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path), "sample": _sample(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sampled(path: Path, digest) -> None:
    """Feed a hash with the size of a file and with pieces of it at equal distances, the first and the last among them.

    A file of up to 256 kB is read whole.
    """
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _PIECES * _PIECE:
            digest.update(file.read())
            return
        for index in range(_PIECES):
            file.seek((size - _PIECE) * index // (_PIECES - 1))
            digest.update(file.read(_PIECE))


def _sample(path: Path) -> str:
    digest = hashlib.sha256()
    sampled(path, digest)
    return digest.hexdigest()


def _walk(folder: Path) -> Iterable[str]:
    """Every file below a folder, by its path in it."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name).relative_to(folder).as_posix() for name in sorted([*files, *links]))


def _leaf(name: str) -> str:
    return name.rsplit("/", 1)[-1]
