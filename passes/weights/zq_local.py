"""ZQ-Local (ZeroQuant-V2, arXiv 2303.08302): each weight trained so that rounding it changes its linear less."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from ...errors import within
from ...graph.edit import get_tensor, set_tensor
from ...graph.narrow import widened
from ...graph.sites import linears
from ...plan.linear_plan import LinearPlan
from ...quant.straight_through import train_weight
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord
from .gptq import hessian_statistic
from .rounding import integer_format, why_not_integer
from .rtn import RoundToNearest
from .training import TrainedWeights


@method("weights", "zq_local")
class ZQLocalSection(TrainedWeights):
    """Weights trained so that each linear gives what it gave in float when they are rounded; then rounded to nearest.

    Tokens are weighed where they enter the Hessian.
    """

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        trained = ZQLocal(plan, self.learning_rates, self.steps, self.token_norm_power)
        return [trained, RoundToNearest(plan)]


@dataclass(frozen=True)
class ZQLocal(GraphPass):
    """Changes float weights; rounding them to nearest comes after it.

    What is minimised is the squared output error over all calibration tokens. It depends on them through the Hessian
    alone, so no activations are kept.

    Attributes:
        plan: by linear name; linears without a scheme, or without a grid of integers, stay as they are.
        learning_rates: compared on a few rows of each weight, as shares of the mean step between codes.
        steps: updates of a weight.
        token_norm_power: tokens are divided by their norm to this power before they enter the Hessian: a few tokens
            of huge norm (attention sinks) otherwise own it.
    """

    plan: Mapping[str, LinearPlan]
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1)
    steps: int = 100
    token_norm_power: float = 0.75
    preserves_values: ClassVar[bool] = True

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        return {
            linear.input: lambda: hessian_statistic(self.token_norm_power)
            for linear in linears(module.graph)
            if not why_not_integer(self.plan, linear)
        }

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, handover = PassResult(), context.handover
        for linear in linears(module.graph):
            name, why = linear.name, why_not_integer(self.plan, linear)
            if not why and bool(context.statistics[linear.input].unseen().all()):
                why = "no calibration token reached it"
            if why:
                result.skipped.append(SiteRecord(name, why))
                continue
            w, factor = widened(get_tensor(module, linear.weight)), handover.folded.get(name)
            hessian = context.statistics[linear.input].value()
            seen = w
            if factor is not None:
                seen, hessian = w / factor, hessian * factor * factor[:, None]
            with within(name):
                found = train_weight(seen, hessian, integer_format(self.plan[name]), self.learning_rates, self.steps)
            if found.learning_rate is None:
                result.skipped.append(SiteRecord(name, "no learning rate gave less error than rounding"))
                continue
            handover.keep_weight(name, w)
            set_tensor(module, linear.weight, found.weight if factor is None else found.weight * factor)
            what = f"error {found.error:.3f} of rounding's, learning rate {found.learning_rate:g}, {found.steps} steps"
            result.changed.append(SiteRecord(name, what, {"error relative to rounding": round(found.error, 4)}))
        return result
