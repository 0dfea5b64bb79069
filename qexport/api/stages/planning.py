"""Third stage: what becomes of every layer, told from shapes alone."""

import logging
from dataclasses import dataclass

from ...graph.sites import Linear
from ...lower.last_token import read_by_projection
from ...plan.model_plan import output_projection
from ..refusals import Decisions, check_applicable, decide
from .capturing import Capture
from .preparing import timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportPlan(Capture):
    """A `Capture`, and what becomes of it.

    Attributes:
        decisions: the decision for every layer.
        projection: the linear that makes the logits; None where there is none.
        read_last: where logits are those of the last token only, the name of the value that this linear reads.
    """

    decisions: Decisions
    projection: Linear | None
    read_last: str | None


@timed
def plan(found: Capture) -> ExportPlan:
    """Decide for every layer, and refuse what cannot become a file; no weight is read.

    Raises:
        QExportError: as `refusals.decide`; or an option means nothing for this kind of model.
    """
    captured, options = found.captured, found.options
    check_applicable(captured.kind, options, found.recipe)
    decisions = decide(captured, found.recipe, found.target, options.deployed_attention)
    _log(decisions)
    return ExportPlan(
        **vars(found), decisions=decisions,
        projection=output_projection(captured),
        read_last=read_by_projection(captured) if options.logits == "last" else None,
    )  # fmt: skip


def _log(decisions: Decisions) -> None:
    """What was chosen: INFO for what differs from what the recipe asks of all, DEBUG for the rest."""
    for kind, plan in (
        ("linears", decisions.plan), ("embeddings", decisions.embeddings), ("convolutions", decisions.convolutions),
    ):  # fmt: skip
        if plan:
            logger.info("%d of %d %s are quantized", sum(p.scheme is not None for p in plan), len(plan), kind)
        for p in plan:
            level = logging.INFO if p.reason else logging.DEBUG
            logger.log(level, "%s: %s%s", p.name, p.scheme.name if p.scheme else "float", p.reason and f", {p.reason}")
