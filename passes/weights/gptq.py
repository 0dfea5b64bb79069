"""GPTQ (arXiv 2210.17323): codes that suit the inputs really seen, by their Hessian."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.fx import GraphModule, Node

from ...graph.edit import get_tensor
from ...graph.meta import Meta
from ...graph.narrow import widened
from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat, QuantizedWeight, SteppedFormat
from ...quant.gptq import gptq_quantize, gptq_together
from ...quant.hessian import HessianStatistic, InverseFactor, factorize
from ...recipe.methods import WeightMethod
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord
from .rounding import planned, quantize_linears

_TOGETHER = 1 << 23  # numbers of weights that are rounded together: of more the single columns are long enough


@method("weights", "gptq")
class GPTQSection(WeightMethod):
    """Codes that give the outputs on calibration data (GPTQ, arXiv 2210.17323).

    Attributes:
        damp: share of the mean of the Hessian's diagonal that is added to its diagonal.
        act_order: quantize the input features with the largest Hessian diagonal first.
        token_norm_power: every token of the Hessian is divided by its L2 norm to this power; 0 leaves tokens as they
            are, 1 keeps the few tokens with huge activations from drowning out the others.
        clip_search: shrink the range of each scale where that lowers the squared error of the weights.
    """

    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = False
    token_norm_power: float = Field(0.75, ge=0, le=2)
    clip_search: bool = False
    calibrates: ClassVar[bool] = True
    kl_left: ClassVar[float] = 0.35
    kl_left_narrowed: ClassVar[float] = 0.6
    clips_by_inputs: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [GPTQ(plan, self.damp, self.act_order, self.token_norm_power, self.clip_search)]

    def table_statistic(self) -> HessianStatistic:
        return hessian_statistic(self.token_norm_power)

    def round_table(self, table: torch.Tensor, fmt: IntegerFormat, seen: HessianStatistic | None) -> QuantizedWeight:
        hessian = None if seen is None else seen.value()
        if hessian is None or not hessian.any():
            return fmt.round_to_nearest(table, self.clip_search)
        return gptq_quantize(
            table, hessian, fmt, damp=self.damp, act_order=self.act_order, clip_search=self.clip_search
        )


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

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        """One Hessian for a value; for all values that linears of one weight read, and what else reads these, one too:
        it takes the memory of one however often a module is called."""
        sites = [n for n in linears(module.graph) if planned(self.plan, n) and not _read_elsewhere(n)]
        return {value: partial(_as_it_is, seen) for value, seen in self._together(sites).items()}

    def grid(self, linear: Linear, w: torch.Tensor, fmt: SteppedFormat, factor: InverseFactor) -> SteppedFormat:
        """The format of a weight [N, K], of the plan's size at most."""
        return fmt

    def _together(self, sites: Sequence[Linear]) -> dict[Node, HessianStatistic]:
        """By value that these linears read, an empty statistic; the same one where a weight meets several values."""
        found: dict[Node, HessianStatistic] = {}
        by_weight: dict[str, list[Node]] = {}
        for linear in sites:
            by_weight.setdefault(linear.weight, []).append(linear.input)
        for values in by_weight.values():
            met = [found[value] for value in values if value in found]
            seen = met[0] if met else hessian_statistic(self.token_norm_power)
            found |= {value: seen for value, other in found.items() if other in met}
            found |= dict.fromkeys(values, seen)
        return found

    def _compensates(self, linear: Linear) -> bool:
        """Whether the codes of a linear can be moved, so that errors can be pushed on."""
        scheme = self.plan[linear.name].scheme if planned(self.plan, linear) else None
        return scheme is not None and isinstance(scheme.weight, SteppedFormat)

    def _steps(self, linear: Linear) -> SteppedFormat:
        """The format of a linear that `_compensates`."""
        fmt = self.plan[linear.name].chosen.weight
        assert isinstance(fmt, SteppedFormat)
        return fmt

    def call(self, module: GraphModule, context: Context) -> PassResult:
        folded = context.handover.folded
        sites = {n.weight: n for n in linears(module.graph) if self._compensates(n) and not _read_elsewhere(n)}
        # Looked up now: what a linear reads becomes another node where it is the result of one that is rounded before.
        statistics = {weight: context.statistics[linear.input] for weight, linear in sites.items()}
        reached = {seen: not seen.unseen().all() for seen in statistics.values()}
        groups = _groups({w: (statistics[w], linear) for w, linear in sites.items() if linear.name not in folded})
        # Groups of one Hessian share its factor, and linears with factors of their own need the Hessian itself.
        sharing = Counter(statistics[weight] for weight, group in groups.items() if weight == group[0])
        alone = Counter(statistics[weight] for weight, linear in sites.items() if linear.name in folded)
        factors: dict[HessianStatistic, InverseFactor] = {}  # of those whose other groups are still to come
        missed = [linear.name for weight, linear in sites.items() if not reached[statistics[weight]]]
        ready: dict[str, QuantizedWeight] = {}  # of groups of which one has been asked for

        def factor_of(seen: HessianStatistic) -> InverseFactor:
            sharing[seen] -= 1
            if seen not in factors:
                # No name for the Hessian: it is to be gone when it is factorized.
                factors[seen] = factorize(seen.total() if alone[seen] else seen.take(), self.damp, self.act_order)
            return factors[seen] if sharing[seen] else factors.pop(seen)

        def own_factor(seen: HessianStatistic, scales: torch.Tensor) -> InverseFactor:
            alone[seen] -= 1
            return factorize((seen.total() * scales).mul_(scales[:, None]), self.damp, self.act_order)

        def quantize(
            linear: Linear, w: torch.Tensor, fmt: SteppedFormat, factor: torch.Tensor | None
        ) -> QuantizedWeight:
            if _read_elsewhere(linear):
                return fmt.round_to_nearest(w, self.clip_search)
            seen = statistics[linear.weight]
            if not reached[seen]:
                return fmt.round_to_nearest(w)
            if factor is not None:
                found = own_factor(seen, factor)
                return gptq_quantize(w, found, self.grid(linear, w, fmt, found), clip_search=self.clip_search)
            if linear.weight not in ready:
                beside = [sites[weight] for weight in groups[linear.weight]]
                found = factor_of(seen)
                weights = [widened(get_tensor(module, other.weight)) for other in beside]
                formats = [
                    self.grid(other, weight, self._steps(other), found)
                    for other, weight in zip(beside, weights, strict=True)
                ]
                codes = gptq_together(weights, found, formats, clip_search=self.clip_search)
                ready.update(zip(groups[linear.weight], codes, strict=True))
            return ready.pop(linear.weight)

        result = quantize_linears(module, self.plan, context.handover, quantize, moves=SteppedFormat)
        result.skipped += [SiteRecord(name, "rounded to nearest: no calibration token reached it") for name in missed]
        return result


def _groups(sites: Mapping[str, tuple[HessianStatistic, Linear]]) -> dict[str, list[str]]:
    """By weight those that are rounded together: of one Hessian, and no more than are fast that way."""
    groups: dict[str, list[str]] = {}
    open_groups: dict[HessianStatistic, tuple[list[str], int]] = {}
    for weight, (seen, linear) in sites.items():
        size = linear.shape[0] * linear.shape[1]
        names, before = open_groups.get(seen, ([], 0))
        if before + size > _TOGETHER:
            names, before = [], 0
        names.append(weight)
        open_groups[seen], groups[weight] = (names, before + size), names
    return groups


def _as_it_is(seen: HessianStatistic) -> HessianStatistic:
    return seen


def _read_elsewhere(linear: Linear) -> bool:
    """Whether other blocks read the weight, so that its Hessian is not known here."""
    return Meta.READ_ELSEWHERE in linear.node.meta


def hessian_statistic(token_norm_power: float) -> HessianStatistic:
    """An empty Hessian; token_norm_power: tokens are divided by their norm to this power, 0 leaves them as they are."""
    return HessianStatistic("token_norm" if token_norm_power else "none", token_norm_power or 1.0)
