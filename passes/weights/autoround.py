"""AutoRound (arXiv 2309.05516): how each weight is rounded and where each range is clipped, by the signs of gradients.

    codes = clamp(round(W / s + V) + z),  s and z of the range [a min(W), b max(W)] of each group

V in [-1/2, 1/2], a and b in [0, 1] are trained for each block so that it hands on what the float block does. A step
goes against the sign of the gradient (SignSGD), by a length that falls to 0, so that the way of a parameter is bounded
by half the steps times the rate. The best parameters that were met are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat
from ...quant.learned_codes import grid_of, range_of
from ...recipe.registry import method
from ..base import GraphPass
from .block_training import GridWeight, LatentCodes, Shared, TrainedCodes, Update
from .training import TrainedBlocks


@method("weights", "autoround")
class AutoRoundSection(TrainedBlocks):
    """Rounding and clipping trained for each block by the signs of gradients (AutoRound).

    Attributes:
        rate: of the rounding, in steps between codes; None for 1 over the number of steps, which lets a weight go half
            a step at most.
        clip_rate: of the share of its range that a group uses; None for the same.
        clip_search: begin with the share that leaves the least squared error of the weights. Training from whole ranges
            comes to half of them at most, and symmetric codes of 2 bits want less than that from the start.
    """

    rate: float | None = Field(None, gt=0, le=1)
    clip_rate: float | None = Field(None, ge=0, le=1)
    clip_search: bool = False
    kl_left: ClassVar[float] = 0.3
    kl_left_narrowed: ClassVar[float] = 0.35

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        rate = 1 / self.steps if self.rate is None else self.rate
        clip_rate = 1 / self.steps if self.clip_rate is None else self.clip_rate
        return [AutoRound(plan, self.steps, self.batches, self.token_norm_power, rate, clip_rate, self.clip_search)]


class Rounding(GridWeight):
    """Where a weight lies between codes, and how much of its range each group uses.

    Args:
        reach: how many steps the offset of a weight covers.
        clip_search: begin with the clipping that leaves the least squared error.
    """

    def __init__(
        self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None, reach: int = 1, clip_search: bool = False
    ) -> None:
        self._reach = reach
        super().__init__(w, fmt, factor)
        self._low, self._high = range_of(w, fmt)
        self.offsets = torch.zeros_like(self.groups).requires_grad_()
        share = torch.ones_like(self._low)
        if clip_search:
            whole, _ = grid_of(self._low, self._high, fmt)
            share = (fmt.clipped_scales(w)[0] / whole).clamp_max(1)
        self.low_share, self.high_share = (share.clone().requires_grad_() for _ in range(2))

    @property
    def parameters(self) -> list[Tensor]:
        return [self.offsets, self.low_share, self.high_share]

    def grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, zero = grid_of(self._low * self.low_share, self._high * self.high_share, self.format)
        return self.groups / scale[..., None] + self._reach * self.offsets, scale, zero


@dataclass(frozen=True)
class AutoRound(TrainedCodes):
    """Codes within a step of the nearest ones, and clipped ranges.

    Attributes:
        rate, clip_rate: length of the first step of an offset, in steps between codes, and of a share of a range.
        clip_search: as the section has it.
    """

    rate: float = 0.01
    clip_rate: float = 0.01
    clip_search: bool = False

    def latent(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> LatentCodes:
        return Rounding(w, fmt, factor, clip_search=self.clip_search)

    def updates(self, latents: Sequence[LatentCodes], shared: Shared) -> Update:
        parameters = [tensor for latent in latents for tensor in latent.parameters]
        # In the order of `Rounding.parameters`.
        lengths = [self.rate, self.clip_rate, self.clip_rate] * len(latents)
        bounds = [(-0.5, 0.5), (0.0, 1.0), (0.0, 1.0)] * len(latents)

        def update(gradients: Sequence[Tensor | None], left: float) -> None:
            for tensor, gradient, length, bound in zip(parameters, gradients, lengths, bounds, strict=True):
                if gradient is not None:
                    tensor.sub_(gradient.sign_(), alpha=length * left).clamp_(*bound)

        return update
