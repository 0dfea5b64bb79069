"""Errors that rounding does not make: a fault in a file, told from what its formats cost.

Rounding errors have no direction. Over noise, the error of an output channel has next to nothing in common with what
one group of its weights contributes (a scale that is wrong has: the error is that contribution again, so many times),
nor with the sum of the inputs of a group (a zero point that is wrong has). What leaves the weights alone, such as the
scale of an input, shows in the SQNR of a linear beside the others of its kind.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.formats import PER_TENSOR, Scheme
from .formatting import own
from .report import InputRange, ValueComparison

# Measured on good exports of a model of 135M parameters, and of the same with planted outliers: 4 bits by rounding, by
# GPTQ and with low-rank branches, 8 bits with static and with dynamic inputs (30 layers, 210 linears each). None of
# these has a fault, and the margins are what lies between their largest number and the threshold.
# Gain of a group, less 1: -0.46 to 0.44 there. A scale 4 times too large makes it 3, a tenth of one -0.9.
_GAIN = 0.9
# Of few bits, most weights of many a group become zero, and then its gain does.
_GAIN_OF_FEW_BITS = 2.0
# Offset of a group in steps: 0.38 there, where it makes a fifth of the errors of its channel. One code off makes it 1.
_OFFSET = 0.7
# GPTQ leaves 0.9 in linears of 64 features and fewer that read what a norm has centred: there the sum of an input is
# zero, so that an offset changes nothing that they make. Wider ones of the same kinds stay below 0.7.
_NARROW, _OFFSET_OF_NARROW = 128, 1.5
# Shares of the errors of a channel that a gain or an offset explains. Over 256 rows chance alone comes to 0.12.
_SHARE_OF_GAIN, _SHARE_OF_OFFSET = 0.15, 0.2
# How far a linear lies below the median of its kind: 6.0 dB there, or 13.7 median deviations of 0.3 dB; never both. The
# scale of an input, an eighth as large, costs 19 dB.
_BELOW, _DEVIATIONS = 12.0, 8.0
# Where kinds differ much between layers, a fault hides among them: one static scale divided by 8 took a linear 17 dB
# down, of a kind with median deviations of more than 2. Something else that points at the same linear lowers the bar.
_BELOW_TOO, _DEVIATIONS_TOO = 6.0, 2.0
# Share beyond a static scale, and times the median share of the kind; 6e-4 and 5 at most on good ones.
_CLIPPED, _TIMES_CLIPPED = 1e-3, 10.0
_HEADROOM = 4.0  # times the median of the kind, or a part of it: how far the static scale reaches of the largest value
_MOSTLY_ERROR = 3.0  # dB; deviations of a kind excuse no linear with so much error, half of what it makes
_COST = 10.0  # times the median cost in KL of the kind
_CLIPPED_ALONE = 0.05  # no observer leaves so much outside, whatever the others do
_OTHERS = 2  # of a kind, at least
# By whether the linear in front is known to be wrong.
_SHOWS = {
    False: "a factor on channels of {} in front of it would show",
    True: "what is wrong with {} in front of it shows",
}
# Error of a channel over its signal on noise, without what gains and offsets of its groups explain. 4 bits leave 0.01
# to 0.1; two rows in each other's place make it 1, and so do codes in another order. Fewer bits leave so much that
# nothing can be told.
_LOST, _ODD, _TIMES_ODD = 0.7, 0.4, 6.0
# Share of all errors of a weight that gains of its groups explain, less what chance does; scales in each other's place.
_EXPLAINED = 0.5
# Gain of an input channel over all outputs, less 1, where it makes more of the errors than rounding a whole channel to
# zero would (3 / K at most), or where it is far more than rounding makes of small weights and no chance. A factor of
# smoothing that is divided out in front and not multiplied back, 4 times too large, makes it 3.
_COLUMN, _TIMES_ROUNDED = 0.5, 12.0
_COLUMN_ALONE, _TIMES_CHANCE = 1.5, 50.0


@dataclass(frozen=True)
class _Group:
    """A group of weights that is off: of which channel, where in it, and how far (a gain, or an offset in steps)."""

    channel: int
    index: int
    amount: float


@dataclass(frozen=True)
class Grid:
    """What a weight was rounded to: bits of a code, input features to a scale (0 or less: all), whether zero points."""

    bits: int
    group_size: int
    has_zero_points: bool


def grid_of(scheme: str) -> Grid:
    """The grid of a scheme by its name."""
    fmt = Scheme.parse(scheme).weight
    return Grid(fmt.bits, fmt.group_size, fmt.has_zero_points)


def fault_of_weight(x: Tensor, weight: Tensor, error: Tensor, fmt: Grid) -> str:
    """What is wrong with a deployed weight, in words; empty where it is rounded and nothing else.

    Args:
        x: noise, [rows, K]; error: what the deployed linear makes of it less what the float one does, [rows, N].
        weight: the float one, [N, K], factors of smoothing folded in.
        fmt: what it is rounded to.
    """
    size = fmt.group_size if fmt.group_size > 0 else weight.shape[1]
    energy = error.square().sum(0).clamp_min(1e-30)
    gains: list[_Group] = []
    offsets: list[_Group] = []
    explained, shifted = torch.zeros_like(energy), torch.zeros_like(energy)
    bar = _OFFSET if weight.shape[1] >= _NARROW else _OFFSET_OF_NARROW
    for index, (part, columns) in enumerate(zip(x.split(size, 1), weight.split(size, 1), strict=True)):
        gain, share = _along(error, part @ columns.t(), energy)
        explained += share
        off = gain > _GAIN_OF_FEW_BITS if fmt.bits < 4 else gain.abs() > _GAIN
        gains += _groups(index, gain, off & (share > _SHARE_OF_GAIN))
        if not fmt.has_zero_points:
            continue
        step = (columns.amax(1) - columns.amin(1)).clamp_min(1e-30) / (2**fmt.bits - 1)
        offset, share = _along(error, part.sum(1, keepdim=True), energy)
        shifted += share
        offsets += _groups(index, offset / step, ((offset / step).abs() > bar) & (share > _SHARE_OF_OFFSET))
    coarse = fmt.bits < 4 or fmt.group_size == PER_TENSOR
    if not coarse and (lost := _lost_channels(x, weight, energy * (1 - explained - shifted))):
        return lost
    found, what = (gains, "scale") if len(gains) >= len(offsets) else (offsets, "zero point")
    if not found:
        elsewhere = "" if coarse else _scales_elsewhere(explained, energy, -(-weight.shape[1] // size), len(x))
        return elsewhere or _input_channel_off(x, weight, error)
    worst, parts = max(found, key=lambda group: abs(group.amount)), -(-weight.shape[1] // size)
    how = f"a factor of {1 + worst.amount:.2g}" if what == "scale" else f"{abs(worst.amount):.1f} steps"
    units, place = ("groups", f" in group {worst.index}") if parts > 1 else ("channels", "")
    return (
        f"{len(found)} of {len(weight) * parts} {units} of its weight off in {what}, channel {worst.channel}{place} by "
        f"{how}"
    )


def _lost_channels(x: Tensor, weight: Tensor, energy: Tensor) -> str:
    """Says so where the error [N] of channels, in energy, is as large as what they make."""
    signal = (x @ weight.t()).square().sum(0)
    ratio = energy / signal.clamp_min(1e-30)
    some = signal > 1e-6 * signal.median()
    lost = some & ((ratio > _LOST) | ((ratio > _ODD) & (ratio > _TIMES_ODD * ratio[some].median())))
    if not bool(lost.any()):
        return ""
    worst = int(ratio.masked_fill(~lost, 0).argmax())
    return (
        f"{int(lost.sum())} of {len(weight)} channels of its weight are not the float ones, channel {worst} with an "
        f"SQNR of {-10 * math.log10(float(ratio[worst])):.1f} dB"
    )


def _scales_elsewhere(explained: Tensor, energy: Tensor, groups: int, rows: int) -> str:
    """Says so where the errors of a weight are its groups again, more or less of each."""
    share = float((explained * energy).sum() / energy.sum()) - groups / rows
    if share < _EXPLAINED:
        return ""
    return f"scales of its {'groups' if groups > 1 else 'channels'} are off: they explain {share:.0%} of its error"


def _input_channel_off(x: Tensor, weight: Tensor, error: Tensor) -> str:
    """Says so where what one input channel contributes is in the errors of all outputs again, so many times."""
    seen = error.t() @ x / x.square().sum(0).clamp_min(1e-30)  # [N, K], the error of each weight, and chance
    dot, square = (seen * weight).sum(0), weight.square().sum(0).clamp_min(1e-30)
    gain, share = dot / square, dot.square() / square * x.square().sum(0) / error.square().sum().clamp_min(1e-30)
    off = (gain.abs() > _COLUMN) & (share > _TIMES_ROUNDED / weight.shape[1])
    off |= (gain > _COLUMN_ALONE) & (share > _TIMES_CHANCE / error.numel())
    if not bool(off.any()):
        return ""
    worst = int(share.masked_fill(~off, 0).argmax())
    return (
        f"{int(off.sum())} of {weight.shape[1]} input channels of its weight are off, channel {worst} by a factor of "
        f"{1 + gain[worst]:.2g}"
    )


def _along(error: Tensor, direction: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """How often a direction [rows, N or 1] is in the errors [rows, N] of channels, and its share of their energy."""
    dot, square = (error * direction).sum(0), direction.square().sum(0).clamp_min(1e-30)
    return dot / square, dot.square() / square / energy


def _groups(index: int, amount: Tensor, off: Tensor) -> list[_Group]:
    return [_Group(channel, index, float(amount[channel])) for channel in off.nonzero().flatten().tolist()]


def with_faults(
    rows: Sequence[ValueComparison], ranges: Sequence[InputRange], unfused: Mapping[str, str],
    behind: Mapping[str, str], stacked: bool = True,
) -> tuple[ValueComparison, ...]:  # fmt: skip
    """Rows of linears with what is wrong with them in words, where something is.

    Args:
        rows: those whose weights are wrong say so already.
        unfused: by name, the operator there is and the planned one.
        behind: by name, the linear in front whose channels smoothing rescaled, so that its own row cannot show factors.
        stacked: the model is a stack of layers, in which linears of names alike do the same.
    """
    inputs = {name: found for found in ranges for name in found.linears}
    alone = {row.name: _alone(row, rows if stacked else [row], inputs) for row in rows}
    wrong = {row.name for row in rows if row.fault or alone[row.name]}
    marked = []
    for row in rows:
        front = behind.get(row.name)
        # Factors are told by what the linear in front made: where that is wrong, they say nothing of this weight.
        of_weight = "" if front in wrong else row.fault
        said = [said for said in (unfused.get(row.name), of_weight) if said] or alone[row.name]
        if said and front and row.name not in unfused:
            said = [*said, f"{_SHOWS[front in wrong].format(front)} here too"]
        marked.append(row.model_copy(update={"fault": "; ".join(said)}))
    return tuple(marked)


def _alone(row: ValueComparison, rows: Sequence[ValueComparison], inputs: Mapping[str, InputRange]) -> list[str]:
    """What is wrong with a linear whatever its weight is like."""
    evidence = _evidence(row, rows, inputs)
    if others := _below(row, rows, bool(evidence)):
        return [others, *evidence]
    if row.name in inputs and (inputs[row.name].clipped or 0.0) > _CLIPPED_ALONE:
        return [_beyond(inputs[row.name])]
    return []


def _evidence(row: ValueComparison, rows: Sequence[ValueComparison], inputs: Mapping[str, InputRange]) -> list[str]:
    """What besides its SQNR sets a linear apart from those that do the same in other layers."""
    others = [other for other in rows if other is not row and _kind(other) == _kind(row)]
    if len(others) < _OTHERS:
        return []
    said, mine = [], inputs.get(row.name)
    beside = [inputs[other.name] for other in others if other.name in inputs]
    if mine is not None and mine.clipped is not None and len(beside) >= _OTHERS:
        usual = statistics.median(other.clipped or 0.0 for other in beside)
        if mine.clipped > max(_CLIPPED, _TIMES_CLIPPED * usual):
            said.append(_beyond(mine))
        usual = statistics.median(_headroom(other) for other in beside)
        if not usual / _HEADROOM < _headroom(mine) < _HEADROOM * usual:
            said.append(f"its static scale reaches {_headroom(mine):.2g} times as far as its input")
    costs = [other.kl_cost for other in others if other.kl_cost is not None]
    if row.kl_cost is not None and len(costs) >= _OTHERS:
        usual = statistics.median(costs)
        if usual > 0 and row.kl_cost > _COST * usual:
            said.append(f"it costs {row.kl_cost / usual:.0f} times the KL of the others like it")
    return said


def _beyond(found: InputRange) -> str:
    return f"{found.clipped:.1%} of its input is beyond its static scale"


def _headroom(found: InputRange) -> float:
    return found.reach / found.absmax if found.reach and found.absmax else 1.0


def _below(row: ValueComparison, rows: Sequence[ValueComparison], evidence: bool) -> str:
    """Says so where a linear is far below those that do the same in other layers.

    Args:
        evidence: whether anything else sets it apart.
    """
    kind, value = _kind(row), own(row)
    beside = [own(other) for other in rows if other is not row and _kind(other) == kind]
    others = [other for other in beside if other is not None]
    if value is None or len(others) < _OTHERS:
        return ""
    median = statistics.median(others)
    deviation = statistics.median(abs(other - median) for other in others)
    bar = max(_BELOW_TOO, _DEVIATIONS_TOO * deviation) if evidence else max(_BELOW, _DEVIATIONS * deviation)
    if value < _MOSTLY_ERROR:
        bar = min(bar, _BELOW)
    if median - value < bar:
        return ""
    return f"its SQNR of {value:.1f} dB is {median - value:.1f} dB below the median of the {len(others)} others like it"


def _kind(row: ValueComparison) -> tuple:
    """Linears of layers that are alike have names alike but for numbers, and as many weights."""
    weights = round(8 * row.bytes / row.bits) if row.bytes and row.bits else None
    return re.sub(r"\d+", "#", row.name), row.scheme, row.kernel, weights
