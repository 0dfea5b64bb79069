"""Between the fourth stage and the fifth: a table of embeddings that may have 4 or 8 bits gets one of them.

The 4 bits are tried on the float model: what they cost alone, without an error anywhere else. Large vocabularies of
small models pay more for them than for all their linears together, and others next to nothing.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from ...calibrate.block_activations import Feeds, Stream
from ...plan.embedding_plan import EmbeddingPlan
from ...plan.model_plan import with_table
from ...recipe.sections import AUTO
from ...validation.formatting import number
from ...validation.quality import limit_of
from ...validation.table_cost import table_cost
from ..refusals import Decisions, decide
from .calibrating import Calibration

logger = logging.getLogger(__name__)

MOST = limit_of("good") / 3
"""KL that 4 bits of a table may cost: a third of what an export may that is called good, for a part of the whole."""

_WIDE = 8  # bits that cost too little to be worth a measurement
_TOKENS = 512  # on which they are tried: a cost is far from the bound, or either choice will do


def settle(found: Calibration) -> Calibration:
    """Decide what `embedding: auto` means for a model; everything else stays.

    Raises:
        QExportError: as `decide`.
    """
    if found.recipe.embedding != AUTO:
        return found
    captured, asked = found.captured, found.recipe
    table = next((e for e in found.decisions.embeddings if e.scheme is not None), None)
    if table is None or table.chosen.weight.bits >= _WIDE:
        return replace(found, recipe=with_table(captured, asked), decisions=_explained(found.decisions, ""))
    cost = _cost(found, table)
    eight = cost is None or not cost <= MOST
    why = "what 4 bits cost is only measured for calibrated decoders"
    if cost is not None:
        why = f"4 bits cost KL {number(cost)} by themselves, and {number(MOST)} is the most"
    logger.info("%s: %s", table.name, why)
    recipe = with_table(captured, asked, eight=eight)
    decisions = decide(captured, recipe, found.target, found.options.deployed_attention) if eight else found.decisions
    return replace(found, recipe=recipe, decisions=_explained(decisions, why))


def _explained(decisions: Decisions, why: str) -> Decisions:
    embeddings = [e if e.scheme is None else replace(e, reason=why) for e in decisions.embeddings]
    return replace(decisions, embeddings=embeddings)


def _cost(found: Calibration, table: EmbeddingPlan) -> float | None:
    """What the codes that would be deployed cost; None of other models than decoders, and without calibration text."""
    if found.batches is None or found.captured.kind != "decoder":
        return None
    values = found.captured.load(table.weight).to(found.captured.placement.device)
    codes = found.tables.attempt(table.weight, values, table.chosen.weight)
    feeds, real = _few(found.captured, found.batches())
    progress = partial(found.options.progress, "embedding")
    return table_cost(found.captured, table.weight, codes.dequantize(), [feeds], [real], progress)


def _few(captured: Any, stream: Stream) -> tuple[Feeds, Any]:
    """The first texts of the first batch, and which of their tokens are real."""
    batch, mask = stream.batches[0], stream.masks[0]
    given = {port.name: batch[port.value] for port in captured.inputs if port.value in batch}
    rows = max(_TOKENS // given["input_ids"].shape[1], 1)
    return {name: value[:rows] for name, value in given.items()}, None if mask is None else mask[:rows]
