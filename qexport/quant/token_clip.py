"""How far the range of a token reaches: below its largest magnitude where clipping that costs less than a coarser step.

A symmetric grid of few bits that reaches to the largest of many values spends most of its codes on values that hardly
occur. For 576 normal values and 15 codes the squared error is least at about 0.8 of the largest.
"""

import torch
from torch import Tensor

from .. import ranks
from .formats import ActivationFormat
from .zero_fraction import TokenKernel, token_step

CLIPS = tuple(round(1 - 0.04 * i, 2) for i in range(14))  # 1 to 0.48


class TokenClip(TokenKernel):
    """Which share of each token's largest magnitude the range should reach to, for the least error on what was seen.

    Errors are relative to the norm of their token, so that a few large tokens do not decide for all.

    Args:
        fmt: dynamic, per token.
    """

    def __init__(self, fmt: ActivationFormat) -> None:
        super().__init__(fmt)
        self._errors = torch.zeros(len(CLIPS), dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in x, float [tokens, K]."""
        super().update(x)
        step = token_step(x, self._fmt).clamp_min(1e-12)
        norm = x.square().sum(-1).clamp_min(1e-24)
        for place, clip in enumerate(CLIPS):
            codes = (x / (step * clip)).round_().clamp_(-self._fmt.qmax, self._fmt.qmax)
            off = codes.mul_(step * clip).sub_(x).square_().sum(-1) / norm
            self._errors[place] += off.double().sum().cpu()

    def across(self) -> None:
        """See `Statistic`."""
        super().across()
        ranks.total(self._errors)

    def clip(self) -> float:
        """The best share; 1 where nothing was seen."""
        return CLIPS[int(self._errors.argmin())]
