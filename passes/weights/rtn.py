"""Rounding to nearest: no data, no search but for where a range is clipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat, QuantizedWeight
from ...recipe.methods import WeightMethod
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult
from .rounding import quantize_linears


@method("weights", "rtn", default=True)
class RTNSection(WeightMethod):
    """Round to nearest.

    Attributes:
        clip_search: shrink the range of each scale where that lowers the squared error of the weights.
    """

    clip_search: bool = False
    takes_shared: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [RoundToNearest(plan, self.clip_search)]

    def round_table(self, table: torch.Tensor, fmt: IntegerFormat, seen: Any) -> QuantizedWeight:
        return fmt.round_to_nearest(table, self.clip_search)


@dataclass(frozen=True)
class RoundToNearest(GraphPass):
    """Nearest code, scales from the range of each group (or clipped where that lowers the squared error).

    Attributes:
        plan: by linear name; linears without a scheme stay as they are.
        clip_search: choose each group's clipping ratio by its squared error.
    """

    plan: Mapping[str, LinearPlan]
    clip_search: bool = False
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        return quantize_linears(module, self.plan, context.handover, clip_search=self.clip_search)
