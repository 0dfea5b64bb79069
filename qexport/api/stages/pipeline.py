"""All stages of an export, one after another."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...artifact.output import WorkFolder
from ...errors import InputError, QExportError
from ..result import ExportResult
from .calibrating import calibrate
from .capturing import capture
from .lowering import lower
from .packaging import package
from .planning import plan
from .preparing import Preparation
from .quantizing import quantize
from .settling import settle


def run(prepared: Preparation, work: WorkFolder) -> ExportResult:
    """Export what is one file: a decoder, an encoder, a module, or a part of an encoder-decoder.

    Args:
        work: where it grows, and which folder it becomes.

    Raises:
        QExportError: of any of the stages.
    """
    calibrated = settle(calibrate(plan(capture(prepared))))
    with _forgetting(work):
        return package(lower(quantize(calibrated, work)), work)


@contextmanager
def _forgetting(work: WorkFolder) -> Iterator[None]:
    """Drop finished blocks with an error that going on from them would end with again."""
    try:
        yield
    except QExportError as error:
        if not isinstance(error, InputError):
            work.discard()  # neither a bad model nor a bad pass gets better by going on from where it stopped
        raise
