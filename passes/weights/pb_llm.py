"""PB-LLM (arXiv 2310.00034): the most salient weights in 8 bits, of all others the sign, times one magnitude a group.

The paper chooses single weights, and marks them in a mask of a bit each. Here it is whole groups of input features, by
the same salience (the squared weight over the squared diagonal entry of the factor of H^-1, as in SliM-LLM): these need
no mask, and ONNX Runtime's kernels read them. Codes are GPTQ's, so that the weights still to come absorb what signs
leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...graph.sites import Linear
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerCodes, SteppedFormat
from ...quant.formats.mixed_bits import MixedBits
from ...quant.hessian import InverseFactor
from ...recipe.registry import method
from ..base import GraphPass
from .gptq import GPTQ, GPTQSection
from .slim_llm import salience

_BITS = 8


@method("weights", "pb_llm")
class PBSection(GPTQSection):
    """Salient groups in 8 bits, of others the sign (PB-LLM, arXiv 2310.00034).

    Attributes:
        salient: share of the groups in 8 bits, as far as the bits of the scheme reach: those of the scheme, less one,
            over 7.
    """

    salient: float = Field(0.1, gt=0, lt=1)

    kl_left: ClassVar[float] = 1.0
    kl_left_narrowed: ClassVar[float] = 1.0

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [PB(plan, self.damp, self.act_order, self.token_norm_power, self.clip_search, self.salient)]


@dataclass(frozen=True)
class PB(GPTQ):
    """GPTQ on groups of 8 bits and of one; formats that cannot have them keep theirs.

    Attributes:
        salient: share of the groups in 8 bits.
    """

    salient: float = 0.1

    def grid(self, linear: Linear, w: Tensor, fmt: SteppedFormat, factor: InverseFactor) -> SteppedFormat:
        if not isinstance(fmt, IntegerCodes) or not MixedBits.may_replace(fmt, w.shape[1]):
            return fmt
        found = salience(w, factor.squared_pivots, fmt)
        count = int(min(self.salient, (fmt.bits - 1) / (_BITS - 1)) * len(found))
        bits = torch.ones(len(found), dtype=torch.int64)
        bits[found.topk(count).indices.cpu()] = _BITS
        return MixedBits.of(fmt, bits.tolist())
