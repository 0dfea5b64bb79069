"""What the methods that make codes of weights share: rounding to nearest, and the walk over the linears of a block."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from ... import ranks
from ...errors import within
from ...graph.edit import finish, get_tensor
from ...graph.narrow import widened
from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat, QuantizedWeight, SteppedFormat
from ..base import PassResult, PassState, SiteRecord
from ..insert_qdq import insert_weight

_F = TypeVar("_F", bound=SteppedFormat)
# weight [N, K], its format, and the factor [K] that its columns shall carry after it is rounded (None: 1)
Quantize = Callable[[Linear, torch.Tensor, _F, torch.Tensor | None], QuantizedWeight]


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
    return "" if isinstance(scheme.weight, IntegerFormat) else f"{scheme.name} is not an integer format"


def integer_format(plan: LinearPlan) -> IntegerFormat:
    """The grid of a linear that `why_not_integer` finds nothing wrong with.

    Raises:
        TypeError: it has none.
    """
    fmt = plan.chosen.weight
    if not isinstance(fmt, IntegerFormat):
        raise TypeError(f"{plan.name} is {plan.chosen.name}, which is not an integer format")
    return fmt


def _shared_out(
    module: GraphModule, plan: Mapping[str, LinearPlan], handover: PassState, quantize: Quantize[_F], moves: type[Any]
) -> dict[str, QuantizedWeight]:
    """Codes by weight that several processes have found together, those of one value in one; none of one alone."""
    if ranks.size() == 1:
        return {}
    by_value: dict[Node, list[Linear]] = {}
    for linear in linears(module.graph):
        if planned(plan, linear) and isinstance(plan[linear.name].chosen.weight, moves):
            by_value.setdefault(linear.input, []).append(linear)
    jobs = list(by_value.values())
    work = [sum(float(n.shape[0]) * n.shape[1] ** 2 for n in job) + float(job[0].shape[1]) ** 3 for job in jobs]
    mine: dict[str, QuantizedWeight] = {}
    for owner, job in zip(ranks.owners(work), jobs, strict=True):
        for linear in job if owner == ranks.rank() else ():
            factor, w = handover.folded.get(linear.name), widened(get_tensor(module, linear.weight))
            fmt = plan[linear.name].chosen.weight
            if linear.weight not in mine and isinstance(fmt, moves):
                with within(linear.name):
                    mine[linear.weight] = quantize(linear, w if factor is None else w / factor, fmt, factor)
    return {name: codes for part in ranks.gather(mine) for name, codes in part.items()}


def quantize_linears(
    module: GraphModule,
    plan: Mapping[str, LinearPlan],
    handover: PassState,
    quantize: Quantize[_F] | None = None,
    clip_search: bool = False,
    moves: type[Any] = IntegerFormat,
) -> PassResult:
    """Replace every planned linear of a block by the form of its format.

    Linears of one weight have one set of codes. Those in other blocks find the same ones again: `quantize` has to do
    without statistics of a weight that several blocks read, see `Meta.READ_ELSEWHERE`.

    Args:
        quantize: finds codes of the formats that are `moves`; None, and weights of other formats: the nearest ones.
        clip_search: of the nearest codes, see `WeightFormat.round_to_nearest`.
    """
    result = PassResult()
    sites = linears(module.graph)
    left = Counter(linear.weight for linear in sites)
    # Of weights that other linears of this block are still to read, and of those that other processes have found.
    found = {} if quantize is None else _shared_out(module, plan, handover, quantize, moves)
    for linear in sites:
        if not planned(plan, linear):
            why = plan[linear.name].reason if linear.name in plan else "not in the plan"
            result.skipped.append(SiteRecord(linear.name, why))
            continue
        decided = plan[linear.name]
        scheme, factor = decided.chosen, handover.folded.get(linear.name)
        w, fmt = widened(get_tensor(module, linear.weight)), scheme.weight
        handover.keep_weight(linear.name, w)
        unscaled = w if factor is None else w / factor
        left[linear.weight] -= 1
        with within(linear.name):
            if linear.weight in found:
                quantized = found.pop(linear.weight)
            elif quantize is not None and isinstance(fmt, moves):
                quantized = quantize(linear, unscaled, fmt, factor)
            else:
                quantized = fmt.round_to_nearest(unscaled, clip_search)
        quantized = quantized.format.kept(quantized)
        if left[linear.weight]:
            found[linear.weight] = quantized
        insert_weight(module, linear, quantized, factor, decided.shares)
        nearest = quantize is not None and not isinstance(fmt, moves)
        what = f"{scheme.name}, rounded to nearest: it is not an integer format" if nearest else scheme.name
        result.changed.append(SiteRecord(linear.name, what))
    finish(module)
    return result
