"""The dry run of an encoder-decoder: of its parts, and of both together."""

from ...artifact.manifest import SEQ2SEQ
from ...capture.seq2seq import capture_seq2seq
from ..dry_run import dry_run
from ..inspection import Inspection
from ..parts import folder_of, whole_inspection
from ..refusals import check_applicable, check_measurable
from ..stages.preparing import Preparation
from .exporting import preparations


def inspect_parts(prepared: Preparation, calibrate: bool) -> Inspection:
    """What an export of an encoder-decoder would do.

    Raises:
        InputError: it should calibrate, which takes texts that the float model writes.
        QExportError: as `dry_run`; or an option that encoder-decoders do not have.
    """
    folder = folder_of(prepared)
    check_measurable(SEQ2SEQ, calibrate)
    check_applicable(SEQ2SEQ, prepared.options, prepared.recipe)
    parts = preparations(prepared, capture_seq2seq(folder))
    return whole_inspection(folder.name, {name: dry_run(part, False) for name, part in parts.items()})
