"""LRQ (arXiv 2407.11534): what each weight is divided by before it is rounded, as a matrix of low rank, by block.

    codes = clamp(round(W / exp(log s + L U + r + c)) + z),  weight = (codes - z) s

with a scale s for each group, L [N, rank], U [rank, K], r [N, 1] and c [1, K] trained so that the block hands on what
the float block does. L, r and c begin at 0, so that training begins at the nearest codes. What is left is codes and
scales as any other: L U + r + c only decide which codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...plan.linear_plan import LinearPlan
from ...quant.affine import grouped
from ...quant.formats import IntegerFormat
from ...quant.learned_codes import grid_of, kept_through, range_of
from ...recipe.registry import method
from ..base import GraphPass
from .block_training import GridWeight, LatentCodes, Shared, TrainedCodes, Update, adam
from .training import TrainedBlocks

_SEED = 20240716


@method("weights", "lrq")
class LRQSection(TrainedBlocks):
    """What weights are divided by before they are rounded, trained for each block as a matrix of low rank (LRQ).

    Attributes:
        rank: of that matrix.
        rate: of Adam, for logarithms of divisors and scales.
    """

    rank: int = Field(32, ge=1, le=4096)
    rate: float = Field(0.01, gt=0, le=1)
    kl_left: ClassVar[float] = 0.5

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [LRQ(plan, self.steps, self.batches, self.token_norm_power, self.rank, self.rate)]


class _Divided(GridWeight):
    """A weight, its divisors and its scales."""

    def __init__(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None, rank: int) -> None:
        super().__init__(w, fmt, factor)
        (n, k), rank = w.shape, min(rank, *w.shape)
        scale, self._zero = grid_of(*range_of(w, fmt), fmt)
        self._start = scale
        random = torch.Generator().manual_seed(_SEED)
        # As large as to let a step of L move every logarithm by about as much as a step of r or c does.
        right = torch.randn(rank, k, generator=random).to(w.device) / rank**0.5
        self._right = right.requires_grad_()
        self._left, self._rows, self._columns, self._scale = (
            torch.zeros(shape, device=w.device).requires_grad_() for shape in ((n, rank), (n, 1), (1, k), scale.shape)
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [self._scale, self._left, self._right, self._rows, self._columns]

    def grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = kept_through(self._start * self._scale.exp(), self.format)
        divisors = (self._left @ self._right + self._rows + self._columns).exp()
        return self.groups / (scale[..., None] * grouped(divisors, self.format).clamp_min(1e-6)), scale, self._zero


@dataclass(frozen=True)
class LRQ(TrainedCodes):
    """Codes of weights divided by a matrix of low rank.

    Attributes:
        rank, rate: as the section has them.
    """

    rank: int = 32
    rate: float = 0.01

    def latent(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> LatentCodes:
        return _Divided(w, fmt, factor, self.rank)

    def updates(self, latents: Sequence[LatentCodes], shared: Shared) -> Update:
        return adam([([tensor for latent in latents for tensor in latent.parameters], self.rate)])
