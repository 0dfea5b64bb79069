"""Logarithmic activation equalization (FPTQ, arXiv 2308.15987): every channel's range becomes its logarithm."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ..numerics.observers import ChannelAbsmax
from ..numerics.smoothing import lae_factors
from .equalize import Equalize, on_producer
from .sites import FoldSite


@dataclass(frozen=True)
class LogEqualize(Equalize):
    """s = max|x| / log2(2 + max|x|). The weights are not consulted."""

    def observer(self) -> ChannelAbsmax:
        return ChannelAbsmax()

    def factors(self, module: GraphModule, site: FoldSite, seen: ChannelAbsmax) -> tuple[torch.Tensor, dict[str, Any]]:
        return lae_factors(on_producer(site, seen.absmax())), {}
