"""GPTQ (arXiv 2210.17323): codes that suit the inputs really seen, by their Hessian."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat, QuantizedWeight
from ...quant.gptq import HessianStatistic, gptq_quantize
from ..base import Context, GraphPass, PassResult, SiteRecord
from .rounding import planned, quantize_linears


@dataclass(frozen=True)
class GPTQ(GraphPass):
    """Column by column, each column's rounding error pushed onto the columns not yet rounded (arXiv 2210.17323).

    Attributes:
        plan: by linear name.
        damp: share of the mean diagonal added to the Hessian.
        act_order: columns with the largest diagonal first; scales stay with the original groups.
        token_norm_power: tokens are divided by their norm to this power before they enter the Hessian: a few tokens
            of huge norm (attention sinks) otherwise own it.
        clip_search: scales by the squared error weighted with the diagonal, not by the range.
    """

    plan: Mapping[str, LinearPlan]
    damp: float = 0.01
    act_order: bool = True
    token_norm_power: float = 1.0
    clip_search: bool = False
    preserves_values: ClassVar[bool] = True

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {
            linear.input: lambda: hessian_statistic(self.token_norm_power)
            for linear in linears(module.graph)
            if planned(self.plan, linear)
        }

    def call(self, module: GraphModule, context: Context) -> PassResult:
        hessians = {value: statistic.value() for value, statistic in context.statistics.items()}
        unreached: list[SiteRecord] = []

        def quantize(linear: Linear, w: torch.Tensor, fmt: IntegerFormat, factor) -> QuantizedWeight:
            hessian = hessians[linear.input]
            if not hessian.any():
                unreached.append(SiteRecord(linear.name, "rounded to nearest: no calibration token reached it"))
                return fmt.round_to_nearest(w)
            if factor is not None:
                hessian = hessian * factor * factor[:, None]
            return gptq_quantize(
                w, hessian, fmt, damp=self.damp, act_order=self.act_order, clip_search=self.clip_search
            )

        result = quantize_linears(module, self.plan, context.handover, quantize)
        result.skipped += unreached
        return result


def hessian_statistic(token_norm_power: float) -> HessianStatistic:
    """An empty Hessian; token_norm_power: tokens are divided by their norm to this power, 0 leaves them as they are."""
    return HessianStatistic("token_norm" if token_norm_power else "none", token_norm_power or 1.0)
