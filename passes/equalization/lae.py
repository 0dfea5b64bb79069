"""Logarithmic activation equalization (FPTQ, arXiv 2308.15987): every channel's range becomes its logarithm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ...graph.sites import FoldSite
from ...plan.linear_plan import LinearPlan
from ...quant.observers import ChannelAbsmax
from ...quant.smoothing import lae_factors
from ...recipe.methods import Equalization
from ...recipe.registry import method
from ..base import Context, GraphPass
from .equalize import Equalize, on_consumers, on_producer


@method("equalization", "lae", key="smooth")
class LAESection(Equalization):
    """A factor per channel that makes ranges their logarithm: max|X| / log2(2 + max|X|) (FPTQ, arXiv 2308.15987).

    Attributes:
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    explicit: bool = False
    takes_shared: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [LogEqualize(plan, explicit=self.explicit)]


@dataclass(frozen=True)
class LogEqualize(Equalize):
    """s = max|x| / log2(2 + max|x|). The weights are not consulted."""

    def observer(self) -> ChannelAbsmax:
        return ChannelAbsmax()

    def factors(self, module: GraphModule, site: FoldSite, seen: ChannelAbsmax) -> tuple[torch.Tensor, dict[str, Any]]:
        return lae_factors(on_producer(site, seen.absmax())), {}

    def done(self, site: FoldSite, value: Node, factors: torch.Tensor, context: Context, data: dict[str, Any]) -> None:
        """Weights that are expanded when they are loaded carry the factor from there on: 4 bits have no room for it."""
        columns = on_consumers(site, factors)
        plans = {c.name: self.plan[c.name] for c in site.consumers if c.name in self.plan}
        expanded = [n for n, p in plans.items() if p.scheme is not None and p.scheme.weight.folds_columns]
        context.handover.folded.update(dict.fromkeys(expanded, columns))
