"""What the methods that make codes of weights share: rounding to nearest, and the walk over the linears of a block."""

from collections.abc import Callable, Mapping

import torch
from torch.fx import GraphModule

from ...errors import QExportError
from ...graph.edit import finish, get_tensor
from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.affine import QuantizedWeight, encode, quantize_weight, search_clip
from ...quant.codebook import quantize_codebook
from ...quant.formats import WeightFormat
from ..base import PassResult, PassState, SiteRecord
from ..insert_qdq import insert_expanded, insert_planes, insert_weight

# weight [N, K], its format, and the factor [K] that its columns shall carry after it is rounded (None: 1)
Quantize = Callable[[Linear, torch.Tensor, WeightFormat, torch.Tensor | None], QuantizedWeight]


def round_to_nearest(w: torch.Tensor, fmt: WeightFormat, clip_search: bool = False) -> QuantizedWeight:
    """The nearest code of the format.

    Args:
        w: float [N, K].
        clip_search: of a format with a grid of integers, shrink the range of each group where that lowers the squared
            error.
    """
    if fmt.codebook is not None:
        return quantize_codebook(w, fmt)
    if not clip_search:
        return quantize_weight(w, fmt)
    scale, zero_point = search_clip(w, fmt)
    return QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)


def planned(plan: Mapping[str, LinearPlan], linear: Linear) -> bool:
    """Whether a linear is to be quantized."""
    return linear.name in plan and plan[linear.name].scheme is not None


def why_not_integer(plan: Mapping[str, LinearPlan], linear: Linear) -> str:
    """Why a method that looks for codes on a grid of integers has none to find at a linear; empty where it has."""
    if linear.name not in plan:
        return "not in the plan"
    scheme = plan[linear.name].scheme
    if scheme is None:
        return plan[linear.name].reason
    return "its grid is a codebook" if scheme.weight.codebook is not None else ""


def quantize_linears(
    module: GraphModule, plan: Mapping[str, LinearPlan], handover: PassState, quantize: Quantize
) -> PassResult:
    """Replace every planned linear of a block by the form of its format, with the codes that `quantize` finds.

    Args:
        quantize: called for formats with a grid of integers; other formats round to nearest.
    """
    result = PassResult()
    for linear in linears(module.graph):
        if not planned(plan, linear):
            why = plan[linear.name].reason if linear.name in plan else "not in the plan"
            result.skipped.append(SiteRecord(linear.name, why))
            continue
        scheme, factor = plan[linear.name].scheme, handover.folded.get(linear.name)
        w = get_tensor(module, linear.weight)
        handover.keep_weight(linear.name, w)
        unscaled = w if factor is None else w / factor
        try:
            if why_not_integer(plan, linear):
                quantized = round_to_nearest(unscaled, scheme.weight)
            else:
                quantized = quantize(linear, unscaled, scheme.weight, factor)
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
