"""DiffQ (arXiv 2104.09987): how many bits each group has, trained by gradients through noise instead of rounding.

Rounding to b bits moves a weight by at most half a step; DiffQ puts uniform noise of that width in its place, of which
the width is differentiable in b. The paper trains weights and bits of a network together and adds its size to the loss.
Here weights stay, a block is trained to hand on what the float block does, and the mean of a weight's bits is held at
those of its scheme, so that the size needs no place in the loss. Then bits become whole numbers of the same sum, and
codes are GPTQ's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule

from ...graph.sites import Linear, linears
from ...plan.linear_plan import LinearPlan
from ...quant.affine import grouped, ungrouped
from ...quant.formats import IntegerCodes, SteppedFormat
from ...quant.formats.mixed_bits import MixedBits
from ...quant.hessian import InverseFactor
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord
from .block_training import Goal, LatentWeight, RoundedBlock, adam, goals_of, unfactored
from .gptq import GPTQ, GPTQSection
from .rounding import planned

_FEWEST, _MOST, _SEED = 1, 8, 20210420


@method("weights", "diffq")
class DiffQSection(GPTQSection):
    """GPTQ on groups whose bits were trained through noise that stands for rounding (DiffQ, arXiv 2104.09987).

    Attributes:
        steps: updates of a block.
        batches: calibration batches that a step sees.
        rate: of Adam, in bits; it falls to 0.
    """

    steps: int = Field(40, ge=1, le=100_000)
    batches: int = Field(1, ge=1, le=1024)
    rate: float = Field(0.1, gt=0, le=1)

    kl_left: ClassVar[float] = 0.3
    kl_left_narrowed: ClassVar[float] = 0.5

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        options = (self.damp, self.act_order, self.token_norm_power, self.clip_search)
        return [DiffQ(plan, *options, steps=self.steps, batches=self.batches, rate=self.rate)]

    def training_passes(self, samples: int, batch_size: int) -> float:
        return 3 * self.steps * self.batches * batch_size / samples


class NoisyWeight(LatentWeight):
    """A weight with noise as wide as the steps between codes would be.

    Args:
        w: float32 [N, K], see `unfactored`.
        random: what noise is drawn from.

    Attributes:
        shift: float32 [G], trained: more or less bits than the format's, but for their mean.
    """

    def __init__(self, w: Tensor, fmt: IntegerCodes, factor: Tensor | None, random: torch.Generator) -> None:
        self._w, self._format, self._factor, self._random = w, fmt, factor, random
        self._largest = grouped(w, fmt).abs().amax(-1)
        self.shift = torch.zeros(fmt.groups(w.shape[1]), device=w.device).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.shift]

    def bits(self) -> Tensor:
        """float32 [G], with the gradients of `shift`."""
        return (self._format.bits + self.shift - self.shift.mean()).clamp(_FEWEST, _MOST)

    def rounded(self) -> Tensor:
        half = self._largest / (2 ** self.bits() - 1)  # of a step between codes that reach to the largest magnitude
        shape = (*half.shape, self._format.group_size)
        noise = (2 * torch.rand(shape, generator=self._random) - 1).to(half.device)
        values = self._w + ungrouped(noise * half[..., None], self._w.shape[1])
        return values if self._factor is None else values * self._factor


@dataclass(frozen=True)
class DiffQ(GPTQ):
    """GPTQ after training of bits; formats whose groups cannot have bits of their own keep theirs.

    Attributes:
        steps, batches, rate: as the section has them.
        bits: of the groups of a weight, by its name: what training has found.
    """

    steps: int = 40
    batches: int = 1
    rate: float = 0.1
    bits: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def call(self, module: GraphModule, context: Context) -> PassResult:
        goals = goals_of(context, 1.0)
        found = [linear for linear in linears(module.graph) if goals and self._takes(linear)]
        bits = self._trained(module, found, goals, context) if found else {}
        result = super(DiffQ, replace(self, bits=bits)).call(module, context)
        for linear in found:
            counts = sorted({few: bits[linear.weight].count(few) for few in bits[linear.weight]}.items())
            said = ", ".join(f"{count} of {few}" for few, count in counts)
            result.changed.append(SiteRecord(linear.name, f"groups by their bits: {said}"))
        return result

    def grid(self, linear: Linear, w: Tensor, fmt: SteppedFormat, factor: InverseFactor) -> SteppedFormat:
        bits = self.bits.get(linear.weight)
        return MixedBits.of(fmt, bits) if bits is not None and isinstance(fmt, IntegerCodes) else fmt

    def _takes(self, linear: Linear) -> bool:
        fmt = self.plan[linear.name].chosen.weight if planned(self.plan, linear) else None
        return MixedBits.may_replace(fmt, linear.shape[1])

    def _trained(
        self, module: GraphModule, found: Sequence[Linear], goals: Sequence[Goal], context: Context
    ) -> dict[str, list[int]]:
        random, latents, wanted = torch.Generator().manual_seed(_SEED), {}, {}
        for linear in found:
            fmt = self.plan[linear.name].chosen.weight
            if isinstance(fmt, IntegerCodes):
                latents[linear.weight] = NoisyWeight(*_weight(module, linear, fmt, context), random)
                wanted[linear.weight] = fmt.bits
        block = RoundedBlock(module, found, latents, self.plan, context.handover)
        update = adam([(block.parameters, self.rate)])
        for step in range(self.steps):
            drawn = [goals[(step * self.batches + place) % len(goals)] for place in range(self.batches)]
            _, gradients = block.gradients(drawn)
            update(gradients, 1 - step / self.steps)
        return {name: whole_bits(latent.bits().detach(), wanted[name]) for name, latent in latents.items()}


def _weight(
    module: GraphModule, linear: Linear, fmt: IntegerCodes, context: Context
) -> tuple[Tensor, IntegerCodes, Tensor | None]:
    w, factor = unfactored(module, linear, context.handover)
    return w, fmt, factor


def whole_bits(bits: Tensor, mean: int) -> list[int]:
    """Whole numbers near to bits, whose sum is at most that of as many times the mean, and this where bits allow it.

    Args:
        bits: float [G], from 1 to 8.
    """
    low = bits.floor()
    left = max(mean * len(bits) - int(low.sum()), 0)
    more = (bits - low).masked_fill(low >= _MOST, -1).argsort(descending=True, stable=True)
    found = low.int()
    found[more[: min(left, int((bits < _MOST).sum()))]] += 1
    while int(found.sum()) > mean * len(bits):  # clamped ones have raised the mean
        found[int((found - bits).masked_fill(found <= _FEWEST, -torch.inf).argmax())] -= 1
    return found.tolist()
