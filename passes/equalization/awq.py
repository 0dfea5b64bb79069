"""AWQ (arXiv 2306.00978): weights that meet large activations get a finer grid, by a factor for each channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ...errors import NumericsError, RecipeError
from ...graph.edit import get_tensor
from ...graph.sites import FoldSite
from ...plan.linear_plan import LinearPlan
from ...quant.observers import ChannelMeanAbs, CompositeObserver, RowSample
from ...quant.smoothing import filled
from ...recipe.methods import Equalization
from ...recipe.registry import method
from ..base import GraphPass
from .equalize import Equalize, on_consumers
from .scale_search import Alpha, best, number

_FLOOR = 1e-4
_CANDIDATES = tuple(i / 20 for i in range(20))


@method("equalization", "awq", key="smooth")
class AWQSection(Equalization):
    """A factor per channel for weights rather than activations: mean|X|^alpha (arXiv 2306.00978).

    Attributes:
        alpha: a number, or "search" for the one with the least output error at each place.
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    alpha: Alpha = 0.5
    explicit: bool = False
    takes_shared: ClassVar[bool] = True
    for_activations: ClassVar[bool] = False

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [AWQ(plan, explicit=self.explicit, alpha=number(self.alpha))]


@dataclass(frozen=True)
class AWQ(Equalize):
    """s = mean|x|^alpha, normalized. Weights are multiplied by s, so it serves linears with float inputs too.

    Attributes:
        alpha: 0 to 1; None searches 0, 0.05, ... 0.95 by the output error of each site's linears, and leaves sites
            where no factor lowers it.
    """

    alpha: float | None = None
    for_activations: ClassVar[bool] = False

    def observer(self) -> ChannelMeanAbs | CompositeObserver:
        return ChannelMeanAbs() if self.alpha is not None else CompositeObserver(ChannelMeanAbs(), RowSample())

    def factors(self, module: GraphModule, site: FoldSite, seen: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
        if self.alpha is not None:
            if self.alpha == 0:
                return None, {"alpha": 0.0, "why": "alpha 0 makes no factors"}
            return awq_factors(_producer_mean(site, seen.mean()), self.alpha), {"alpha": self.alpha}
        channels, rows = seen.parts
        mean = _producer_mean(site, channels.mean())
        weights = [get_tensor(module, c.weight) for c in site.consumers]
        schemes = [self.plan[c.name].scheme if c.name in self.plan else None for c in site.consumers]
        found = best(_CANDIDATES, lambda a: on_consumers(site, awq_factors(mean, a)), rows.rows(), weights, schemes)
        if not found.helps:
            return None, {**found.data(), "why": "no factor is better than none"}
        return awq_factors(mean, found.value), found.data()


def awq_factors(activation_mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_j = mean|x_j|^alpha, floored at 1e-4, over the geometric mean of the largest and the smallest.

    Args:
        activation_mean: mean|x_j| of every feature, [K].
        alpha: 0 (no factor) to 1.
    Returns:
        float32 [K], positive; a feature that is never active has that of the median one (see `filled`).
    Raises:
        NumericsError: NaN or Inf in a mean.
        RecipeError: alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"AWQ with alpha {alpha} is out of range", remedy="Use a number from 0 to 1")
    mean = activation_mean.double()
    if not bool(torch.isfinite(mean).all()):
        raise NumericsError("an activation has NaN or Inf", remedy="Check the checkpoint and the data")
    if not mean.any():
        return torch.ones_like(mean).float()
    factors = filled(mean).pow(alpha).clamp_min_(_FLOOR)
    least, most = factors.aminmax()
    return (factors / (least * most).sqrt()).float()


def _producer_mean(site: FoldSite, means: torch.Tensor) -> torch.Tensor:
    """Of a vector [in_features of the consumers], the mean for each channel of the producer.

    Query heads that share a kv head read the same channel, each as many tokens: it is the mean over all of them.
    """
    if site.repeat is None:
        return means
    return means.view(site.repeat).mean(dim=1).reshape(-1)
