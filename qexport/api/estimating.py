"""What an export will take, from its plan and the speed of the machine."""

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from ..calibrate.data import needs_data
from ..calibrate.recipe_passes import passes_for
from ..cost.estimate import SHORT, Estimate, estimated
from ..cost.machine import measured
from ..cost.work import Data, Effort, Reading
from ..graph.sites import linears
from ..passes.base import GraphPass
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import bytes_by_part
from .stages.planning import ExportPlan

LONG = 60.0  # seconds, from which an export says what it will take


def estimate(planned: ExportPlan) -> Estimate:
    """The estimate for a planned export; the machine is measured where the work is not short."""
    recipe, decisions = planned.recipe, planned.decisions
    calibration = recipe.calibration
    by_name = {linear.name: linear for linear in decisions.plan}
    blocks = {block.name: _readings(block.module, by_name) for block in planned.captured.blocks}
    wanted = needs_data(recipe, [*decisions.plan, *decisions.convolutions])
    hidden = int(planned.captured.settings.get("hidden_size", 0))
    data = Data(calibration.samples if wanted else 0, calibration.sequence_length, calibration.batch_size, hidden)
    looks = sum(_collects(step) for step in passes_for(recipe, by_name, calibrated=wanted)) if wanted else 0
    hessians = wanted and recipe.weights.table_statistic() is not None
    given = calibration.samples, calibration.batch_size
    trained = recipe.weights.training_passes(*given)
    trained += 0.0 if recipe.tune is None else recipe.tune.training_passes(*given)
    effort = Effort(2 + looks + trained if wanted else 0, hessians)
    file = bytes_by_part(
        planned.captured, decisions.plan, decisions.embeddings, planned.target.dtype.itemsize, decisions.convolutions
    )["total"]  # fmt: skip
    first = estimated(blocks, data, effort, None, file)
    if first.work.flops < SHORT:
        return first
    machine = measured(planned.options.placement.device, products=calibration.products)
    return estimated(blocks, data, effort, machine, file)


def _readings(module: GraphModule, by_name: Mapping[str, LinearPlan]) -> list[Reading]:
    """What the planned linears of a block read."""
    found: dict[tuple[Node, int, bool], list[int]] = {}
    for linear in linears(module.graph):
        if (planned := by_name.get(linear.name)) is not None:
            found.setdefault((linear.input, planned.shape[1], planned.scheme is not None), []).append(planned.shape[0])
    return [Reading(inputs, tuple(outputs), rounded) for (_, inputs, rounded), outputs in found.items()]


def _collects(step: GraphPass) -> bool:
    """Whether a pass looks at values on all calibration data."""
    kind = type(step)
    return kind.statistics is not GraphPass.statistics or kind.wanted is not GraphPass.wanted
