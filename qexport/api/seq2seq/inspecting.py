"""The dry run of an encoder-decoder: of its parts, and of both together."""

from collections.abc import Mapping

from ...artifact.manifest import SEQ2SEQ
from ...capture.seq2seq import capture_seq2seq
from ...cost.estimate import both
from ...errors import InputError
from ..dry_run import dry_run
from ..inspection import Inspection
from ..refusals import check_applicable
from ..stages.preparing import Preparation
from .exporting import folder_of, preparations


def inspect_parts(prepared: Preparation, calibrate: bool) -> Inspection:
    """What an export of an encoder-decoder would do.

    Raises:
        InputError: it should calibrate, which takes texts that the float model writes.
        QExportError: as `dry_run`; or an option that encoder-decoders do not have.
    """
    folder = folder_of(prepared)
    if calibrate:
        raise InputError(
            "ranges of an encoder-decoder are measured by its export only", place=folder.name,
            remedy="Inspect it without calibration",
        )  # fmt: skip
    check_applicable(SEQ2SEQ, prepared.options, prepared.recipe)
    parts = preparations(prepared, capture_seq2seq(folder))
    return _whole(folder.name, {name: dry_run(part, False) for name, part in parts.items()})


def _whole(name: str, parts: Mapping[str, Inspection]) -> Inspection:
    """Both parts together."""
    found = list(parts.values())
    first = found[0]
    return Inspection(
        model=name, recipe=first.recipe, target=first.target, calibrates=any(part.calibrates for part in found),
        calibration="", smooths=first.smooths, linears=tuple(p for part in found for p in part.linears),
        activations={name: what for part in found for name, what in part.activations.items()},
        slow={name: why for part in found for name, why in part.slow.items()},
        sites=tuple(site for part in found for site in part.sites), attention="",
        parameters=sum(part.parameters for part in found),
        bytes={name: sum(part.bytes[name] for part in found) for name in first.bytes},
        estimate=both([part.estimate for part in found]),
        embeddings=tuple(table for part in found for table in part.embeddings),
        convolutions=tuple(c for part in found for c in part.convolutions),
        warnings=tuple(dict.fromkeys(sentence for part in found for sentence in part.warnings)), parts=parts,
    )  # fmt: skip
