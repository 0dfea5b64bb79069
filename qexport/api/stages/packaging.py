"""Last stage: the file is written, run once, and appears as a folder with everything that belongs to it."""

import logging
import time
from pathlib import Path

from ...artifact.manifest import Manifest
from ...artifact.output import WorkFolder
from ...calibrate.coverage import unseen_shares, warning
from ...formatting import megabytes
from ...lower.adapter_inputs import keep_adapters
from ...lower.saving import write_model
from ...lower.sizes import by_part
from ...passes.moe_coverage import CountChoices
from ...report import read_export, write_card
from ...runtime.first_run import run_once
from ..describing import described_codes, manifest_of, published, report_of
from ..folder import write_companions
from ..result import ExportResult
from .lowering import Lowering

logger = logging.getLogger(__name__)


def package(made: Lowering, work: WorkFolder) -> ExportResult:
    """Write the folder of an export; it takes its place when all of it is there.

    Args:
        work: where it grows, and which folder it becomes.

    Raises:
        InputError: the disk is full, or something has come to its place meanwhile.
        NumericsError: the dtype of the graph cannot hold a tensor.
        RuntimeProblem: ONNX Runtime refuses the file, or fails to run it.
    """
    started = time.perf_counter()
    captured, progress = made.captured, made.options.progress
    rarely, unseen = _rarely_chosen(made), _unseen(made)
    told = warning({name: share for name, share in unseen.items() if name not in rarely})
    without = captured.folder.notes if captured.folder else ()
    late = [*([told] if told else []), *_unchecked(made)]
    for sentence in late:  # the others have been said when they were found
        logger.warning("%s", sentence)
    warnings = (*without, *captured.notes, *late)
    with work.appearing() as folder:
        size = write_model(
            folder, made.lowered.model, lambda done, total: progress("write", "model.onnx.data", done, total)
        )
        named = (made.projection.name, made.projection.weight) if made.projection else ("", "")
        sizes = by_part(size, made.lowered.tensors, made.lowered.bytes, made.decisions.embeddings, named)
        manifest = manifest_of(made, sizes)
        if made.options.adapters:
            manifest = keep_adapters(folder, manifest, made.options.adapters)
        ran = _first_run(made, folder, manifest)
        logger.info("model.onnx and its data take %s; %s", megabytes(size), ran)
        seconds = {
            name: round(took, 2)
            for name, took in (made.seconds | {"package": time.perf_counter() - started}).items()
        }  # fmt: skip
        report = report_of(made, ran, seconds, warnings)
        write_companions(folder, manifest, captured.folder, published(made.recipe).to_yaml(), report)
        write_card(read_export(folder))
    return ExportResult(
        folder=work.given, manifest=manifest, plan=made.decisions.plan, seconds=seconds, calibration=made.described,
        embeddings=made.decisions.embeddings, convolutions=made.decisions.convolutions,
        dense={name: why for block in made.lowered.graphs for name, why in block.dense.items()}, rarely_chosen=rarely,
        unseen=unseen, warnings=warnings, kept=work.kept, reference=made.agreement,
        codes=described_codes(captured, made.decisions, made.target),
    )  # fmt: skip


def _first_run(made: Lowering, folder: Path, manifest: Manifest) -> str:
    """What was run of a finished file, or why nothing was."""
    if why_not := made.target.why_not_run():
        return f"not run: {why_not}"
    progress = made.options.progress
    progress("run", "the file, once", 0, 1)
    ran = run_once(folder, manifest, {port.name: port.sizes for port in made.captured.inputs})
    progress("run", "the file, once", 1, 1)
    return ran


def _unchecked(made: Lowering) -> list[str]:
    """A warning where the witness of a model could say nothing."""
    return [made.agreement.sentence()] if made.captured.witness is not None and made.agreement.why_not else []


def _rarely_chosen(made: Lowering) -> dict[str, str]:
    return {name: what for item in made.blocks for name, what in item.record.skipped.get(CountChoices.__name__, ())}


def _unseen(made: Lowering) -> dict[str, float]:
    """Shares of features that were never active, for the linears that have some."""
    counts = {name: count for item in made.blocks for name, count in item.record.unseen.items()}
    never = 0 if made.seen is None else int(made.seen.unseen().sum())
    if never and made.projection is not None:
        counts[made.projection.name] = never
    return unseen_shares(counts, made.decisions.plan)
