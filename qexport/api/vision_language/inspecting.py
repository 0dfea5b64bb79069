"""The dry run of a model of pictures and text: of its parts, and of all together."""

from ...artifact.manifest import DECODER, VISION_LANGUAGE
from ...capture.vision_language import capture_vision_language
from ..dry_run import dry_run
from ..inspection import Inspection
from ..parts import folder_of, whole_inspection
from ..refusals import check_applicable, check_measurable
from ..stages.preparing import Preparation
from .exporting import preparations


def inspect_pictures(prepared: Preparation, calibrate: bool) -> Inspection:
    """What an export of a model of pictures and text would do.

    Raises:
        InputError: it should calibrate, which takes what the parts hand to each other.
        QExportError: as `dry_run`; or an option that such models do not have.
    """
    folder = folder_of(prepared)
    check_measurable(VISION_LANGUAGE, calibrate)
    check_applicable(VISION_LANGUAGE, prepared.options, prepared.recipe)
    parts = preparations(prepared, capture_vision_language(folder))
    found = {name: dry_run(part, False) for name, part in parts.items()}
    return whole_inspection(folder.name, found, found[DECODER].attention)
