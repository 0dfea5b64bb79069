"""SmoothQuant (arXiv 2211.10438): move the difficulty of activations into weights, exactly, channel by channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ...graph.edit import get_tensor
from ...graph.sites import FoldSite
from ...plan.linear_plan import LinearPlan
from ...quant.observers import ChannelAbsmax, CompositeObserver, RowSample
from ...quant.smoothing import smoothquant_factors
from ...recipe.methods import Equalization
from ...recipe.registry import method
from ..base import GraphPass
from .equalize import Equalize, on_consumers, on_producer
from .scale_search import ALPHAS, Alpha, best, number


@method("equalization", "smoothquant", key="smooth", default=True)
class SmoothQuantSection(Equalization):
    """A factor per channel from activations to weights: max|X|^alpha / max|W|^(1-alpha) (arXiv 2211.10438).

    Attributes:
        alpha: a number, or "search" for the one with the least output error at each place.
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    alpha: Alpha = 0.5
    explicit: bool = False
    takes_shared: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [SmoothQuant(plan, explicit=self.explicit, alpha=number(self.alpha))]


@dataclass(frozen=True)
class SmoothQuant(Equalize):
    """s = max|x|^alpha / max|w|^(1-alpha).

    Attributes:
        alpha: 0 leaves activations as they are, 1 makes all their channels equal; None searches it by the output error
            of each site's linears, and leaves sites where no factor lowers it.
    """

    alpha: float | None = 0.5

    def observer(self) -> ChannelAbsmax | CompositeObserver:
        return ChannelAbsmax() if self.alpha is not None else CompositeObserver(ChannelAbsmax(), RowSample())

    def factors(self, module: GraphModule, site: FoldSite, seen: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
        weights = [get_tensor(module, c.weight) for c in site.consumers]
        shared = [part for w in weights for part in _rows_of_producer(site, w)]
        if self.alpha is not None:
            return smoothquant_factors(on_producer(site, seen.absmax()), shared, self.alpha), {}
        channels, rows = seen.parts
        absmax = channels.absmax()

        def factors(alpha: float) -> torch.Tensor:
            return smoothquant_factors(on_producer(site, absmax), shared, alpha)

        schemes = [self.plan[c.name].scheme if c.name in self.plan else None for c in site.consumers]
        found = best(ALPHAS, lambda a: on_consumers(site, factors(a)), rows.rows(), weights, schemes, absmax=absmax)
        if not found.helps:
            return None, {**found.data(), "why": "no factor is better than none"}
        return factors(found.value), found.data()


def _rows_of_producer(site: FoldSite, weight: torch.Tensor) -> list[torch.Tensor]:
    """A consumer's weight [N, K] over the producer's channels: query heads that share one are rows."""
    if site.repeat is None:
        return [weight]
    kv_heads, queries, head_dim = site.repeat
    parts = weight.view(-1, kv_heads, queries, head_dim).unbind(2)
    return [part.reshape(-1, kv_heads * head_dim) for part in parts]
