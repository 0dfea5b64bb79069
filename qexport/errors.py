"""The few kinds of error a user meets: what went wrong, where, and what to do about it."""

import errno
import os
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
        place: the file.
        message: what is wrong, to which the library's own words are added.
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


# There are two to choose from, so that neither is a dependency of the package.
INSTALL_RUNTIME = "pip install 'qexport[cpu]', or 'qexport[cuda]' for NVIDIA GPUs"


@contextmanager
def needing_runtime():
    """Raise InputError where an import fails because no ONNX Runtime is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnxruntime":
            raise
        raise InputError("ONNX Runtime is not installed", remedy=INSTALL_RUNTIME) from error


@contextmanager
def writing_to(place: Path, when_full: str):
    """Turn a full disk, whose remedy is `when_full`, or a refused write into an InputError.

    Libraries that are not written in Python say it in errors of their own: safetensors, tokenizers, ONNX Runtime.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _is(error, _FULL, _FULL_TEXTS):
            raise InputError("the disk is full", place=str(place), remedy=when_full) from error
        if _is(error, (errno.EFBIG,), ("(os error 27)",)):
            raise InputError(
                "a file is larger than this file system or this process may write", place=str(place),
                remedy="Choose a folder on another file system, or raise the limit (ulimit -f)",
            ) from error  # fmt: skip
        if _is(error, _REFUSED, ("(os error 13)", "(os error 30)", "(os error 1)")):
            raise InputError("cannot be written", place=str(place), remedy="Choose a folder you own") from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = (
    "(os error 28)", "(os error 122)", "No space left on device", "Disk quota exceeded",
    " requested and ",  # "4096 requested and 512 written", which is all that numpy says
)  # fmt: skip
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM)


def _is(error: BaseException | None, codes: tuple[int, ...], texts: tuple[str, ...]) -> bool:
    """Whether an error, or one that it came from, has one of these numbers, or says so."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in codes:
                return True
        elif any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
