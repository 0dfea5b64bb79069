"""A text file: windows that do not overlap, spread over all of it, each beginning as the tokenizer begins a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ....errors import InputError
from ..documents import spread_windows
from ..registry import Model, Source, forms, source
from ..samples import Samples


@source
class TextFile(Source):
    form = "a text file"
    last = True

    @classmethod
    def takes(cls, name: str) -> bool:
        return True

    def check(self) -> None:
        with opened(self, "text file") as file:
            file.read(1)

    def samples(self, model: Model) -> Samples:
        try:
            with opened(self, "text file") as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"byte {error.start} is not UTF-8", place=str(self.path), remedy="Convert the file"
            ) from None
        return spread_windows(text, self.path.name, self.spec, model.tokenizer)


@contextmanager
def opened(wanted: Source, what: str) -> Iterator[BinaryIO]:
    """The open file of a source, whose errors are explained."""
    path = wanted.path
    try:
        if path.exists() and not path.is_file():
            raise InputError("the calibration text is not a file", place=str(path), remedy=f"Name a {what}")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"cannot read the calibration text: {error.strerror}", place=str(path), remedy=forms()
        ) from None
