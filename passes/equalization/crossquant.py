"""CrossQuant (arXiv 2410.07505): activation steps from token and channel together, the channel part folded away.

The paper's step for element (i, j) is t_i^alpha c_j^(1-alpha) / qmax, t_i the token's largest magnitude and c_j the
channel's. With calibrated c, the factor s = c^(1-alpha) goes into the producer and into the columns of the weight, as
in SmoothQuant but without a look at the weight; what is left is one scale per token and one integer matmul.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch.fx import GraphModule, Node

from ...graph.edit import get_tensor
from ...graph.sites import FoldSite
from ...plan.linear_plan import LinearPlan
from ...quant.observers import ChannelAbsmax, CompositeObserver, RowSample
from ...quant.smoothing import crossquant_factors
from ...recipe.methods import Equalization
from ...recipe.recipe import Recipe
from ...recipe.registry import method
from ..base import Context, GraphPass, RowScale
from .equalize import Equalize, on_consumers, on_producer
from .scale_search import ALPHAS, Alpha, best, number


@method("equalization", "crossquant")
class CrossQuantSection(Equalization):
    """Activation steps from token and channel together: t^alpha c^(1-alpha) / qmax (CrossQuant, arXiv 2410.07505).

    The channel part is calibrated and folded away, so that one integer matmul is left.

    Attributes:
        alpha: 1 is one scale per token, 0 one per channel; "search" takes the one with the least output error at each
            place.
        row_scale: "folded": the largest magnitude of the folded token; "paper": t^alpha, widened where a channel
            exceeds its calibrated range, which would clip; "dynamic": as published, both parts measured when it runs,
            which takes a float matmul (for comparison; alpha has to be a number).
        round_weights: "after_fold": the folded weight is rounded; "before_fold": the weight is rounded as the paper
            does it, then folded: 8-bit weights become two int8 planes, and `_int` schemes fold while they expand.
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    alpha: Alpha = 0.15
    row_scale: Literal["folded", "paper", "dynamic"] = "folded"
    round_weights: Literal["after_fold", "before_fold"] = "after_fold"
    explicit: bool = False

    @model_validator(mode="after")
    def _dynamic_folds_nothing(self) -> Self:
        if self.row_scale == "dynamic" and (self.alpha == "search" or self.round_weights == "before_fold"):
            raise ValueError("row_scale: dynamic folds nothing", "Give alpha a number and leave out round_weights")
        return self

    def check(self, recipe: Recipe) -> None:
        """Rounding before the fold needs a place for the factor that the rounding did not see."""
        for scheme in recipe.schemes if self.round_weights == "before_fold" else ():
            if scheme.activation and not scheme.weight.folds_columns and scheme.weight.bits != 8:
                raise ValueError(
                    f"round_weights: before_fold does not work with {scheme.name}",
                    "Take w8a8_dyn, or groups with _int: w4a8_g128_int",
                )

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        if self.row_scale == "dynamic":
            return []
        paper, before = self.row_scale == "paper", self.round_weights == "before_fold"
        return [CrossQuant(plan, self.explicit, number(self.alpha), paper_rows=paper, round_before_fold=before)]

    def quantizer_options(self) -> Mapping[str, Any]:
        return {"cross_alpha": self.alpha} if self.row_scale == "dynamic" else {}

    def why_float_products(self) -> str:
        if self.row_scale != "dynamic":
            return ""
        return "crossquant with row_scale: dynamic gives every element of an input a step of its own"


@dataclass(frozen=True)
class CrossQuant(Equalize):
    """s = c^(1-alpha).

    Attributes:
        alpha: of the paper, 0 to 1; None searches it by the output error of each site's linears.
        paper_rows: the row scale is t^alpha as in the paper; otherwise the largest magnitude of the folded token, which
            costs two operators less and never clips.
        round_before_fold: weights are rounded without the factor, as in the paper, and carry it afterwards.
    """

    alpha: float | None = 0.15
    paper_rows: bool = False
    round_before_fold: bool = False

    def observer(self) -> ChannelAbsmax | CompositeObserver:
        return ChannelAbsmax() if self.alpha is not None else CompositeObserver(ChannelAbsmax(), RowSample())

    def factors(self, module: GraphModule, site: FoldSite, seen: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
        if self.alpha is not None:
            return crossquant_factors(on_producer(site, seen.absmax()), self.alpha), {"alpha": self.alpha}
        channels, rows = seen.parts
        absmax = on_producer(site, channels.absmax())
        weights = [get_tensor(module, c.weight) for c in site.consumers]
        schemes = [self.plan[c.name].scheme if c.name in self.plan else None for c in site.consumers]
        found = best(
            ALPHAS, lambda a: on_consumers(site, crossquant_factors(absmax, a)), rows.rows(), weights, schemes,
            absmax=channels.absmax(), weights_unscaled=self.round_before_fold, paper_rows=self.paper_rows,
        )  # fmt: skip
        return crossquant_factors(absmax, found.value), found.data()

    def done(self, site: FoldSite, value: Node, factors: torch.Tensor, context: Context, data: dict[str, Any]) -> None:
        columns = on_consumers(site, factors)
        if self.paper_rows:
            context.handover.row_scales[value] = RowScale(columns, data["alpha"])
        if self.round_before_fold:
            context.handover.folded.update({c.name: columns for c in site.consumers})
