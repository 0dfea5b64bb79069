"""Third stage: what becomes of every layer, told from shapes alone."""

from dataclasses import dataclass

from ...graph.sites import Linear
from ...lower.last_token import read_by_projection
from ...plan.model_plan import output_projection
from ..refusals import Decisions, check_applicable, decide
from .capturing import Capture
from .preparing import timed


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
    return ExportPlan(
        **vars(found), decisions=decide(captured, found.recipe, found.target, options.attention),
        projection=output_projection(captured),
        read_last=read_by_projection(captured) if options.logits == "last" else None,
    )  # fmt: skip
