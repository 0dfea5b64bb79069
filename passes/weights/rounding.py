"""Weight quantization: round to nearest, half-quadratic scales, or GPTQ with a Hessian of the inputs really seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from ...errors import QExportError
from ...graph.edit import finish, get_tensor
from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.affine import QuantizedWeight, encode, quantize_weight, search_clip
from ...quant.codebook import quantize_codebook
from ...quant.formats import WeightFormat
from ...quant.gptq import HessianStatistic, gptq_quantize
from ...quant.hqq import hqq_quantize
from ..base import Context, GraphPass, PassResult, PassState, SiteRecord
from ..insert_qdq import insert_expanded, insert_planes, insert_weight

# weight [N, K], its format, and the factor [K] that its columns shall carry after it is rounded (None: 1)
Quantize = Callable[[Linear, torch.Tensor, WeightFormat, torch.Tensor | None], QuantizedWeight]


def round_to_nearest(w: torch.Tensor, fmt: WeightFormat, clip_search: bool) -> QuantizedWeight:
    """The nearest code on the range of each group, or on the part of it with the least squared error."""
    if not clip_search:
        return quantize_weight(w, fmt)
    scale, zero_point = search_clip(w, fmt)
    return QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)


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
        def quantize(linear: Linear, w: torch.Tensor, fmt: WeightFormat, factor) -> QuantizedWeight:
            return quantize_codebook(w, fmt) if fmt.codebook is not None else round_to_nearest(w, fmt, self.clip_search)

        return _quantize_all(module, self.plan, context.handover, quantize)


@dataclass(frozen=True)
class HalfQuadratic(GraphPass):
    """HQQ: scales and zero points that make the rounding error sparse, found without data.

    Attributes:
        plan: by linear name; linears without a scheme stay as they are, codebooks are rounded to nearest.
    """

    plan: Mapping[str, LinearPlan]
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        def quantize(linear: Linear, w: torch.Tensor, fmt: WeightFormat, factor) -> QuantizedWeight:
            return quantize_codebook(w, fmt) if fmt.codebook is not None else hqq_quantize(w, fmt)

        return _quantize_all(module, self.plan, context.handover, quantize)


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

        def quantize(linear: Linear, w: torch.Tensor, fmt: WeightFormat, factor) -> QuantizedWeight:
            hessian = hessians[linear.input]
            if fmt.codebook is not None:
                return quantize_codebook(w, fmt)
            if not hessian.any():
                unreached.append(SiteRecord(linear.name, "rounded to nearest: no calibration token reached it"))
                return quantize_weight(w, fmt)
            if factor is not None:
                hessian = hessian * factor * factor[:, None]
            return gptq_quantize(
                w, hessian, fmt, damp=self.damp, act_order=self.act_order, clip_search=self.clip_search
            )

        result = _quantize_all(module, self.plan, context.handover, quantize)
        result.skipped += unreached
        return result


def hessian_statistic(token_norm_power: float) -> HessianStatistic:
    """An empty Hessian; token_norm_power: tokens are divided by their norm to this power, 0 leaves them as they are."""
    return HessianStatistic("token_norm" if token_norm_power else "none", token_norm_power or 1.0)


def planned(plan: Mapping[str, LinearPlan], linear: Linear) -> bool:
    """Whether a linear is to be quantized."""
    return linear.name in plan and plan[linear.name].scheme is not None


def _quantize_all(
    module: GraphModule, plan: Mapping[str, LinearPlan], handover: PassState, quantize: Quantize
) -> PassResult:
    result = PassResult()
    for linear in linears(module.graph):
        if not planned(plan, linear):
            why = plan[linear.name].reason if linear.name in plan else "not in the plan"
            result.skipped.append(SiteRecord(linear.name, why))
            continue
        scheme, factor = plan[linear.name].scheme, handover.folded.get(linear.name)
        w = get_tensor(module, linear.weight)
        handover.keep_weight(linear.name, w)
        try:
            quantized = quantize(linear, w if factor is None else w / factor, scheme.weight, factor)
        except QExportError as error:
            error.place = error.place or linear.name
            raise type(error)(error.message, place=linear.name, remedy=error.remedy) from error
        if scheme.expand:
            insert_expanded(module, linear, quantized, factor)
        elif factor is not None:
            insert_planes(module, linear, quantized, factor)
        else:
            insert_weight(module, linear, quantized)
        result.changed.append(SiteRecord(linear.name, scheme.name))
    finish(module)
    return result
