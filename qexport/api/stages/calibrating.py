"""Fourth stage: the float model is proved to be read as it is, and the data that it is measured on are made."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ... import ranks
from ...calibrate.block_activations import Stream
from ...calibrate.data import calibration_batches, check_own_text, needs_data
from ...calibrate.projection import seen_by_projection
from ...calibrate.recipe_passes import TableRounding
from ...capture.graph import CapturedModel
from ...models.agreement import ReaderAgreement
from ...passes.base import GraphPass
from ...validation.reader import check_reader
from ..refusals import check_range
from .planning import ExportPlan
from .preparing import timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibration(ExportPlan):
    """An `ExportPlan`, and what blocks are calibrated on.

    Attributes:
        agreement: how far the captured float graph is from a witness that reads the model itself.
        batches: makes the calibration inputs; None where nothing needs them.
        described: what they are, for people.
        seen: the weight method's statistic of what the output projection reads in the float model, where it finds
            the codes that it shares with an embedding by one; else None.
        tables: rounds tables of embeddings.
    """

    agreement: ReaderAgreement
    batches: Callable[[], Stream] | None
    described: str
    seen: Any
    tables: TableRounding


@timed
def calibrate(planned: ExportPlan) -> Calibration:
    """Compare the float graph with its witness, then make calibration inputs, where anything needs them.

    Raises:
        CaptureError: the graph and its witness differ by more than rounding.
        InputError: the calibration data cannot be had, or do not fit the model.
        NumericsError: a weight that stays float is beyond the range of the target's dtype.
    """
    captured, recipe, progress = planned.captured, planned.recipe, planned.options.progress
    decisions = planned.decisions
    quantizes_inputs = any(p.activation is not None for p in decisions.plan)
    wanted_data = wants_data(planned) or (planned.asked and quantizes_inputs)
    if wanted_data:
        check_own_text(captured, recipe, planned.data)
    check_range(captured, decisions, planned.target.dtype)
    progress("check", "reading of the model", 0, 1)
    agreement = ranks.first(partial(check_reader, captured))
    progress("check", "reading of the model", 1, 1)
    batches, described, seen = None, "none needed", None
    if wanted_data:
        batches, described = calibration_batches(captured, recipe, planned.data, progress)
        progress("calibrate", described, 1, 1)
    shared = any(table.linear for table in decisions.embeddings)
    wanted = recipe.weights.table_statistic() is not None
    if wanted and batches is not None and shared and planned.projection is not None:
        found = planned.findings
        if found is not None and found.seen is not None:
            seen = found.seen
        else:
            seen = seen_by_projection(
                captured, planned.projection, batches().shared_out(), recipe.weights,
                None if found is None else found.handed_on, partial(progress, "embedding"),
            )  # fmt: skip
            if found is not None:
                found.seen = seen
    logger.info("%s", agreement.sentence())
    logger.info("calibration data: %s", described)
    return Calibration(
        **vars(planned), agreement=agreement, batches=batches, described=described, seen=seen,
        tables=TableRounding(recipe.weights, seen),
    )  # fmt: skip


def wants_data(planned: ExportPlan) -> bool:
    """Whether the recipe or a pass of the caller's wants calibration data."""
    decisions = planned.decisions
    return needs_data(planned.recipe, [*decisions.plan, *decisions.convolutions]) or _ask_for_data(
        planned.options.extra_passes, planned.captured
    )


def _ask_for_data(passes: Sequence[GraphPass], captured: CapturedModel) -> bool:
    """Whether a pass wants statistics, or promises to keep the function, which is checked on data."""
    return any(p.preserves_output or any(p.statistics(b.module) for b in captured.blocks) for p in passes)
