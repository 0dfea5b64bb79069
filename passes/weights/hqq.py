"""HQQ: scales and zero points by a half-quadratic solver, without data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ...graph.sites import Linear
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat, QuantizedWeight
from ...quant.hqq import hqq_quantize
from ...recipe.methods import WeightMethod
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult
from .rounding import quantize_linears


@method("weights", "hqq")
class HQQSection(WeightMethod):
    """Half-quadratic scales and zero points (HQQ), without calibration."""

    kl_left: ClassVar[float] = 0.9
    takes_shared: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [HalfQuadratic(plan)]

    def round_table(self, table: torch.Tensor, fmt: IntegerFormat, seen: Any) -> QuantizedWeight:
        return hqq_quantize(table, fmt)


@dataclass(frozen=True)
class HalfQuadratic(GraphPass):
    """HQQ: scales and zero points that make the rounding error sparse, found without data.

    Attributes:
        plan: by linear name; linears without a scheme stay as they are, formats that are no grid of integers round to
            nearest.
    """

    plan: Mapping[str, LinearPlan]
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        def quantize(
            linear: Linear, w: torch.Tensor, fmt: IntegerFormat, factor: torch.Tensor | None
        ) -> QuantizedWeight:
            return hqq_quantize(w, fmt)

        return quantize_linears(module, self.plan, context.handover, quantize)
