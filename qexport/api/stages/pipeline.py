"""All stages of an export, one after another."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from ... import ranks
from ...artifact.output import WorkFolder
from ...calibrate.projection import FloatFindings
from ...errors import InputError, QExportError
from ...progress import announce
from ...recipe.recipe import Recipe
from ...recipe.sections import AUTO
from ..estimating import LONG, estimate
from ..result import ExportResult
from .calibrating import calibrate
from .capturing import capture
from .lowering import lower
from .packaging import package
from .planning import ExportPlan, plan
from .preparing import Preparation
from .quantizing import quantize
from .settling import settle

logger = logging.getLogger(__name__)


def run(prepared: Preparation, work: WorkFolder) -> ExportResult:
    """Export what is one file: a decoder, an encoder, a module, or a part of an encoder-decoder.

    Args:
        work: where it grows, and which folder it becomes.

    Raises:
        QExportError: of any of the stages.
        PartDone: another process writes it.
    """
    announce(prepared.options.progress, *stages(prepared.recipe))
    planned = plan(capture(prepared))
    _say_what_it_takes(planned)
    with _findings(planned) as found:
        calibrated = settle(calibrate(replace(planned, findings=found)))
        with _forgetting(work):
            quantized = quantize(calibrated, work)
    if ranks.rank() > 0:
        raise ranks.PartDone
    with _forgetting(work):
        return package(lower(quantized), work)


def _findings(planned: ExportPlan) -> AbstractContextManager[FloatFindings]:
    """Those of the exports that this one belongs to, or its own."""
    return FloatFindings() if planned.findings is None else nullcontext(planned.findings)


def stages(recipe: Recipe) -> list[str]:
    """What progress of an export speaks of, in order; there may be nothing to calibrate."""
    tried = ["embedding"] if recipe.embedding == AUTO else []
    trained = ["tune"] if recipe.tune is not None else []
    return ["capture", "check", "calibrate", *tried, "quantize", *trained, "write", "run"]


def _say_what_it_takes(planned: ExportPlan) -> None:
    """The estimate, before a run that is expected to be long."""
    found = estimate(planned)
    logger.info("blocks are expected to take %s", found.sentence())
    if found.seconds is not None and found.seconds > LONG:
        planned.options.progress("estimate", f"blocks take {found.sentence()}", 1, 1)


@contextmanager
def _forgetting(work: WorkFolder) -> Iterator[None]:
    """Drop finished blocks with an error that going on from them would end with again."""
    try:
        yield
    except QExportError as error:
        if not isinstance(error, InputError) and ranks.rank() == 0:
            work.discard()  # neither a bad model nor a bad pass gets better by going on from where it stopped
        raise
