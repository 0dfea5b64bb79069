"""What the weight of a product is beside the float one: what of its error rounding explains, and what it does not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.metrics import sqnr_db
from ..anomalies import Grid, fault_of_weight
from .matching import Match

ROWS = 256
# A whole weight against the float one, less 1. Rounding has no direction, but clipping shrinks: few bits by more.
_GAIN = {2: 0.4, 3: 0.25, 4: 0.12}
_GAIN_OF_MORE, _GAIN_OF_FLOAT = 0.05, 0.01
_SHIFT = 0.6  # steps, the mean of a whole weight's errors: a zero point that is one off makes it 1
# Methods that make up for the errors of other weights move a code by a step and more; by two hardly ever.
_REACH = 1.5
_MANY = 32  # numbers in a row from which its errors say something of it; filters of one channel have 9 or 25
# Input channels carry factors where these explain this much of what looked like error. Rounding they do not explain.
_EXPLAINED = 0.5


@dataclass(frozen=True)
class WeightFindings:
    """One weight of a file beside the float one.

    Attributes:
        sqnr_db: of the whole weight; nearest_db: of the nearest codes on the same scales, what rounding costs at least.
        unexplained: share of the error's energy in weights that are off by more than rounding and its corrections move
            them; None without codes.
        factors: what its input channels are multiplied by, [K], where something in front divides by it; else None.
        fault: what is wrong with it, in words; empty where nothing is.
    """

    sqnr_db: float
    nearest_db: float | None
    unexplained: float | None
    factors: Tensor | None
    fault: str


def weight_findings(
    match: Match, want: Tensor, got: Tensor, step: Tensor | None, smoothed: bool = False
) -> WeightFindings:
    """Compare a weight with the float one.

    Args:
        want, got: the linear's rows, float32 [N, K]; step: the distance of two codes there.
        smoothed: weights of the file carry factors, so that this one's outputs may be divided by such that its readers
            take back: its scale says nothing then, and is told by what it makes.
    """
    weight = match.product.weight
    factors = _factors(want, got)
    wanted = want if factors is None else want * factors
    if smoothed:
        wanted = wanted * _gains(wanted.t(), got.t())[:, None]
    error = got - wanted
    nearest = unexplained = None
    if step is not None:
        size = step.abs().clamp_min(1e-30)
        offset = torch.remainder(got, size)  # of the grid: not 0 where a zero point is no integer
        nearest = sqnr_db(wanted, torch.round((wanted - offset) / size) * size + offset)
        energy = error.square().sum().clamp_min(1e-30)
        unexplained = float(error.square()[error.abs() > _REACH * size].sum() / energy)
    fault = _whole(match, wanted, got, step, smoothed or factors is not None)
    if not fault and match.product.quantized and want.shape[1] >= _MANY:
        x = torch.randint(0, 2, (ROWS, want.shape[1]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        fault = fault_of_weight(x, wanted, x @ error.t(), Grid(weight.bits, weight.block, weight.zero_points))
    return WeightFindings(sqnr_db(wanted, got), nearest, unexplained, factors, fault)


def _factors(want: Tensor, got: Tensor) -> Tensor | None:
    """The factor of each input channel, where the weight differs from the float one by these and little else."""
    factor = _gains(want, got)
    middle = factor.median()
    before, after = (got - middle * want).square().sum(), (got - factor * want).square().sum()
    return factor if after < (1 - _EXPLAINED) * before else None


def _gains(want: Tensor, got: Tensor) -> Tensor:
    """What brings each column of `want` closest to that of `got`."""
    return (want * got).sum(0) / want.square().sum(0).clamp_min(1e-30)


def _whole(match: Match, want: Tensor, got: Tensor, step: Tensor | None, scaled: bool) -> str:
    """What is wrong with a weight as a whole."""
    if match.holds:
        return f"its weight is that of {match.holds}"
    size = want.square().sum().clamp_min(1e-30)
    gain = float((want * got).sum() / size)
    bits = match.product.weight.bits
    allowed = _GAIN.get(bits, _GAIN_OF_MORE if bits < 16 else _GAIN_OF_FLOAT)
    alike = float((want * got).sum() / (size.sqrt() * got.norm()).clamp_min(1e-30))
    if alike < 0.5:
        return f"its weight is not the float one: their cosine is {alike:.2f}"
    if abs(gain - 1) > allowed and not scaled:
        return f"its weight is {gain:.3g} times the float one: its scales are off"
    if step is not None:
        signed = torch.where(step == 0, 1e-30, step)  # some tools have scales below 0
        shift = float(((got - gain * want) / signed).mean())
        if abs(shift) > _SHIFT:
            which = "large" if shift > 0 else "small"
            return f"its weight is {abs(shift):.1f} steps too {which}: its zero points are off"
    if bits >= 16 and sqnr_db(want, got) < 40.0:
        return f"its weight is not the float one: its SQNR is {sqnr_db(want, got):.1f} dB"
    return ""
