"""The few kinds of error a user meets: what went wrong, where, and what to do about it."""

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


class QExportError(Exception):
    """Base of every expected error.

    Args:
        message: what is wrong, in one sentence without a final full stop.
        place: where: a file, a node, a layer, a recipe key.
        remedy: what the user can do about it.
    """

    def __init__(self, message: str, *, place: str | None = None, remedy: str | None = None):
        self.message, self.place, self.remedy = message, place, remedy
        super().__init__(message)

    def __str__(self) -> str:
        """Made when asked for: who passes an error on may know its place better, and libraries add to its args."""
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}. {self.remedy}" if self.remedy else text


class InputError(QExportError):
    """A file, folder, text or option that cannot be used."""


class RecipeError(QExportError):
    """A recipe or scheme that says something impossible or unknown."""


class CaptureError(QExportError):
    """A model that torch.export cannot turn into a graph, or whose weights do not match it."""


class NumericsError(QExportError):
    """NaN or Inf in weights or activations, or a matrix that cannot be factorized."""


class PassError(QExportError):
    """A graph pass whose precondition or postcondition does not hold."""


class LoweringError(QExportError):
    """A graph that has no ONNX form for the chosen target."""


class RuntimeProblem(QExportError):
    """ONNX Runtime cannot load or run the model."""


@contextmanager
def within(place: str):
    """Name `place` in front of the place of an expected error that leaves the `with`, unless it is named there."""
    try:
        yield
    except QExportError as error:
        if place not in (error.place or ""):
            error.place = f"{place}, {error.place}" if error.place else place
        raise


@contextmanager
def reading(place: str | os.PathLike, message: str, remedy: str | None = None, kind: type[QExportError] = InputError):
    """Turn whatever a library raises about a file that people brought into one expected error.

    For the one call of the library, and nothing else: a fault of our own in the `with` would be called the file's.
    Which errors a parser can raise, no library says.

    Args:
        place: the file; message: what is wrong, to which the library's own words are added.
    """
    try:
        yield
    except QExportError:
        raise
    except BaseException as error:
        # A panic in a library of Rust is no Exception, and known by its name only.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message} ({in_a_line(error)})", place=os.fspath(place), remedy=remedy) from error


def in_a_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing, in one line that is not too long."""
    said = " ".join(str(error).split()).rstrip(".")
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said  # whose words are but the key
    return (said if len(said) <= 300 else f"{said[:300]}...") or type(error).__name__


@contextmanager
def writing_to(place: Path, when_full: str):
    """Turn a full disk, whose remedy is `when_full`, or a refused write into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError("the disk is full", place=str(place), remedy=when_full) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError("cannot be written", place=str(place), remedy="Choose a folder you own") from error
        raise


def write_whole(path: Path, text: str, when_full: str = "Free some space") -> None:
    """Write a UTF-8 file by rename, so that it is there whole or as it was.

    Raises:
        InputError: the disk is full (`when_full` is the remedy), or the folder cannot be written.
    """
    with writing_to(path, when_full):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
