"""CrossQuant (arXiv 2410.07505): activation steps from token and channel together, the channel part folded away.

The paper's step for element (i, j) is t_i^alpha c_j^(1-alpha) / qmax, t_i the token's largest magnitude and c_j the
channel's. With calibrated c, the factor s = c^(1-alpha) goes into the producer and into the columns of the weight, as
in SmoothQuant but without a look at the weight; what is left is one scale per token and one integer matmul.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...graph.edit import get_tensor
from ...graph.sites import FoldSite
from ...quant.observers import ChannelAbsmax, CompositeObserver, RowSample
from ...quant.smoothing import crossquant_factors
from ..base import Context, RowScale
from .equalize import Equalize, on_consumers, on_producer
from .scale_search import ALPHAS, best


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
