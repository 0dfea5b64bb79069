"""Temporary folders that a kill does not leave for ever: the next run that makes one there finds and removes them."""

import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, writing_to
from . import owner

_PREFIX = ".qexport-tmp-"
_NAME = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")  # as mkdtemp makes them


class Scratch:
    """A temporary folder, as `tempfile.TemporaryDirectory` is one: gone after the `with`, or by `cleanup`.

    Args:
        beside: folder to make it in; None takes that of the system.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, beside: str | os.PathLike | None = None):
        place = system() if beside is None else Path(beside)
        sweep([place])
        with writing_to(place, _remedy(beside)):
            made = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        self._lock = owner.take(Path(made), "temporary files")
        self.name, self._beside = made, beside

    def __enter__(self) -> Path:
        return Path(self.name)

    def __exit__(self, *error) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove the folder; it may be gone."""
        self._lock.remove()


@contextmanager
def scratch_folder(beside: str | os.PathLike | None = None):
    """Yields the path of a `Scratch`; a disk that gets full within is an InputError that names the place."""
    made = Scratch(beside)
    with made as folder, writing_to(folder.parent, _remedy(beside)):
        yield folder


def system() -> Path:
    """The system's folder for temporary files."""
    return Path(tempfile.gettempdir())


def sweep(places: Iterable[Path]) -> None:
    """Remove temporary folders that killed processes left in these folders."""
    for place in places:
        try:
            found = [entry.path for entry in os.scandir(place) if _NAME.fullmatch(entry.name)]
        except OSError:
            continue
        for path in found:
            if os.path.isdir(path) and not os.path.islink(path):
                owner.clear(Path(path))


def write_whole(path: Path, text: str, when_full: str = "Free some space") -> None:
    """Write a UTF-8 file by rename, so that it is there whole or as it was.

    Raises:
        InputError: the disk is full (`when_full` is the remedy), or the folder cannot be written.
    """
    with writing_to(path, when_full):
        if path.is_dir():
            raise InputError("is a folder", place=str(path), remedy="Give the path of a file")
        with Scratch(path.parent) as folder:
            new = folder / path.name
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)


def _remedy(beside) -> str:
    return "Free some space, or set TMPDIR to a folder with more" if beside is None else "Free some space"
