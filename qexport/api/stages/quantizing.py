"""Fifth stage: block after block goes through the passes of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...artifact.output import WorkFolder, explained
from ...calibrate.fingerprint import fingerprint_of
from ...calibrate.loop import QuantizedBlock, quantize_blocks
from ...calibrate.recipe_passes import passes_for
from ...calibrate.tuning import TuningRecord, tune
from ...passes.base import GraphPass
from .calibrating import Calibration
from .preparing import timed


@dataclass(frozen=True, kw_only=True)
class Quantization(Calibration):
    """A `Calibration`, and the quantized blocks.

    Attributes:
        passes: all that blocks went through.
        blocks: in the order of the model; their tensors are in the work folder.
        tuned: what training them end to end brought; None where that was not asked for.
    """

    passes: Sequence[GraphPass]
    blocks: Sequence[QuantizedBlock]
    tuned: TuningRecord | None


@timed
def quantize(calibrated: Calibration, work: WorkFolder) -> Quantization:
    """Quantize all blocks, or those that an interrupted export had not come to.

    Args:
        work: gets the tensors of the blocks, and a journal.

    Raises:
        InputError: `resume` with the work of another export; no memory, or no space on the disk.
        NumericsError: NaN or Inf in weights or activations.
        PassError: a pass broke a block, or what it promised.
    """
    captured, recipe, options = calibrated.captured, calibrated.recipe, calibrated.options
    decisions, batches = calibrated.decisions, calibrated.batches
    decided = [decisions.plan, decisions.embeddings, decisions.convolutions]
    for_what = (calibrated.target.name, calibrated.target.dtype, decided)
    fingerprint = fingerprint_of(captured, recipe, for_what, batches, options.extra_passes)
    with explained(work.blocks):
        passes = passes_for(
            recipe, {p.name: p for p in decisions.plan}, options.extra_passes, batches is not None,
            decisions.embeddings, calibrated.tables, decisions.convolutions,
        )  # fmt: skip
        stream = batches().shared_out() if batches else None
        kept = calibrated.findings.handed_on.stream(captured) if calibrated.findings else None
        reference = kept or (batches().shared_out() if batches else None)
        before = captured.copy() if recipe.tune is not None and batches else None
        blocks = quantize_blocks(
            captured, passes, stream, reference, work.blocks, fingerprint, resume=options.resume,
            progress=partial(options.progress, "quantize"),
        )  # fmt: skip
        tuned = None
        if before is not None and recipe.tune is not None and batches is not None:
            blocks, tuned = tune(
                captured, before, blocks, recipe.tune, batches, work.blocks / "tuned", partial(options.progress, "tune")
            )
    return Quantization(**vars(calibrated), passes=passes, blocks=blocks, tuned=tuned)
