"""FPTQ (arXiv 2308.15987): each activation is static, equalized and static, or dynamic, by its calibrated range.

A small range costs a static scale nothing. A medium one is compressed by logarithmic equalization first. What is larger
still would be too much for either, and pays for one scale per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.sites import FoldSite, fold_sites
from ...plan.linear_plan import LinearPlan
from ...quant.formats import ActivationFormat
from ...recipe.methods import Equalization
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord
from .input_policy import Decision, InputPolicy
from .lae import LogEqualize


@method("equalization", "fptq")
class FPTQSection(Equalization):
    """A policy for each activation by r, its largest magnitude on calibration data (FPTQ, arXiv 2308.15987).

    Attributes:
        static_up_to: r up to this: one static scale as it is.
        dynamic_from: r from this: one scale per token; between the two: logarithmic equalization, then a static scale.
    """

    static_up_to: float = Field(15.0, ge=0)
    dynamic_from: float = Field(150.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.dynamic_from < self.static_up_to:
            raise ValueError("dynamic_from is below static_up_to", "Leave both out for 150 and 15")
        return self

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [FPTQ(plan, static_up_to=self.static_up_to, dynamic_from=self.dynamic_from)]


def decide(reach: float, static_up_to: float, dynamic_from: float, no_place: str = "") -> Decision:
    """The policy of the paper.

    Args:
        reach: the largest magnitude of the activation on calibration data.
        static_up_to: ranges up to this one are static as they are.
        dynamic_from: ranges from this one on are dynamic.
        no_place: what keeps a factor for each channel from being folded; empty where nothing does. A range between the
            bounds is then dynamic: a static scale is not good enough for it as it is.
    """
    if reach <= static_up_to:
        return Decision("static", False, f"<= {static_up_to:g}")
    if reach >= dynamic_from:
        return Decision("dynamic", False, f">= {dynamic_from:g}")
    between = f"> {static_up_to:g} and < {dynamic_from:g}"
    if no_place:
        return Decision("dynamic", False, f"{between}, {no_place}")
    return Decision("static", True, between)


@dataclass(frozen=True)
class FPTQ(LogEqualize, InputPolicy):
    """Equalize where the range asks for it, and choose the activation format of every site with quantized inputs.

    The formats are handed over to `QuantizeActivations`, which takes the ranges of static ones after the weights are
    quantized. Bits stay those of the scheme.

    Attributes:
        static_up_to, dynamic_from: see `decide`.
    """

    static_up_to: float = 15.0
    dynamic_from: float = 150.0

    def requires(self, module: GraphModule) -> None:
        if not 0 <= self.static_up_to <= self.dynamic_from:
            raise PassError(
                f"static up to {self.static_up_to:g} and dynamic from {self.dynamic_from:g}",
                remedy="Use bounds that are not negative and in this order",
            )

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        return {site.value: self.observer for site in fold_sites(module.graph) if not self.why_left(site)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for site in fold_sites(module.graph):
            names = ", ".join(c.name for c in site.consumers)
            if why := self.why_left(site):
                result.skipped.append(SiteRecord(names, why))
                continue
            seen, value = context.statistics[site.value], site.value
            reach = seen.absmax().max().item()
            decision = self.decision(site, reach)
            what, data = decision.sentence(reach), {"range": reach, "decision": decision.what}
            if decision.equalize:
                factors, _ = self.factors(module, site, seen)
                value, where, data = self.move(module, site, factors, context, data)
                what = f"{what}, {where}"
            (bits,) = self._bits(site)
            context.handover.formats[value] = ActivationFormat(decision.kind, bits)
            result.changed.append(SiteRecord(names, what, data))
        module.recompile()
        return result

    @property
    def rule(self) -> str:
        low, high = f"{self.static_up_to:g}", f"{self.dynamic_from:g}"
        return f"static up to {low}, equalized to {high}, per token from there"

    def why_left(self, site: FoldSite) -> str:
        if why := self._why_left(site):
            return why
        if len(bits := self._bits(site)) > 1:
            listed = " and ".join(map(str, sorted(bits)))
            return f"these linears ask for activations of {listed} bits, and one value has one format"
        return ""

    def decision(self, site: FoldSite, reach: float) -> Decision:
        return decide(reach, self.static_up_to, self.dynamic_from, self._no_place(site))

    def _bits(self, site: FoldSite) -> set[int]:
        schemes = [self.plan[c.name].scheme for c in site.consumers if c.name in self.plan]
        return {s.activation.bits for s in schemes if s is not None and s.activation is not None}
