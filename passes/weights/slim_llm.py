"""SliM-LLM (arXiv 2405.14917): groups of a weight get a bit more or a bit less, by how salient they are.

The salience of a weight is its square over that of its diagonal entry of the factor of H^-1, that of a group of input
features the sum over all its weights. As many of the most salient groups get a bit more as of the least salient ones a
bit less, so that bytes stay; how many, is what leaves the least error of rounding to nearest, measured in the same way
as the salience. Codes are GPTQ's. The paper's groups have their scales searched with a weight on their salient
elements; here that is GPTQ's search, which weighs input features by the diagonal of H.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...graph.sites import Linear
from ...plan.linear_plan import LinearPlan
from ...quant.affine import grouped
from ...quant.formats import IntegerCodes, SteppedFormat
from ...quant.formats.mixed_bits import MixedBits
from ...quant.hessian import InverseFactor
from ...recipe.registry import method
from ..base import GraphPass
from .gptq import GPTQ, GPTQSection

_FEWEST, _MOST = 2, 6  # bits of what is moved up and down


@method("weights", "slim_llm")
class SliMSection(GPTQSection):
    """GPTQ with a bit more for salient groups and a bit less for others (SliM-LLM, arXiv 2405.14917)."""

    kl_left: ClassVar[float] = 0.3
    kl_left_narrowed: ClassVar[float] = 0.5

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [SliM(plan, self.damp, self.act_order, self.token_norm_power, self.clip_search)]


@dataclass(frozen=True)
class SliM(GPTQ):
    """GPTQ on groups of three numbers of bits; formats that cannot have them keep theirs."""

    def grid(self, linear: Linear, w: Tensor, fmt: SteppedFormat, factor: InverseFactor) -> SteppedFormat:
        if not isinstance(fmt, IntegerCodes) or not MixedBits.may_replace(fmt, w.shape[1]):
            return fmt
        if not _FEWEST <= fmt.bits <= _MOST:
            return fmt
        return MixedBits.of(fmt, bits_by_salience(w, factor.squared_pivots, fmt))


def bits_by_salience(w: Tensor, pivots: Tensor, fmt: IntegerCodes) -> list[int]:
    """The bits of every group: those of `fmt`, and as many times one more as one less.

    Args:
        w: float32 [N, K]; pivots: float32 [K], see `InverseFactor.squared_pivots`.
    """
    count = fmt.groups(w.shape[1])
    down, same, up = (
        group_errors(w, pivots, MixedBits.of(fmt, [fmt.bits + more] * count)) for more in (-1, 0, 1)
    )
    order = torch.argsort(salience(w, pivots, fmt), stable=True)
    half = count // 2
    lost = (down - same)[order[:half]].cumsum(0)  # of the least salient
    won = (same - up)[order.flip(0)[:half]].cumsum(0)
    moved = int(torch.cat([lost.new_zeros(1), lost - won]).argmin())
    bits = torch.full((count,), fmt.bits)
    bits[order[:moved].cpu()] -= 1
    bits[order[count - moved :].cpu()] += 1
    return bits.tolist()


def salience(w: Tensor, pivots: Tensor, fmt: IntegerCodes) -> Tensor:
    """Of every group, float64 [G]; arguments: as `bits_by_salience` takes them."""
    return grouped((w.square() / pivots).double().sum(0, keepdim=True), fmt).sum((0, 2))


def group_errors(w: Tensor, pivots: Tensor, fmt: SteppedFormat) -> Tensor:
    """What rounding to nearest costs in each group, float64 [G]; arguments: as `bits_by_salience` takes them."""
    scale, _ = fmt.clipped_scales(w, 1 / pivots)
    off = (fmt.decode(fmt.encode(w, scale, None), scale, None) - w).square_().div_(pivots)
    return grouped(off.double().sum(0, keepdim=True), fmt).sum((0, 2))
