"""A report in plain sentences: what has to be repaired, how good it is, and what was measured."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from ..artifact.manifest import QMOE, STATIC_LSTM
from .formatting import decibels, faulty, kernels, number, own, rank, worst_first
from .quality import graded
from .report import HALF, Foreign, Greedy, Logits, Reference, Report, Unfused

ATTENTION = ("GroupQueryAttention", "Attention", "MultiHeadAttention")
# Share of a value beyond its static scale from which it is worth a sentence: calibration on other text leaves less.
_CLIPPED = 1e-3
_EXACT = 60.0  # dB of its own errors above which an attention is the float one, in float16 too

_LOST = 3.0  # dB of a linear's own errors, half of what it makes
_BEYOND = 0.2  # of the error of a weight, which rounding and what methods add to it leave unexplained

# Errors of rounding are proportional to the unit of the dtype, and KL to their square. From float16 (2^-11) to float32
# (2^-24) the errors shrink by 2^13 and KL by 2^26; half of that is left for kernels that approximate exp and sum in
# another order. What is wrong with a lowering is seldom as small as a 90th of float16's error: it is a missing term,
# another epsilon, a position that is off by one.
_SINGLE_OF_HALF = 2.0**-13
_SINGLE_FLOOR = 1e-10  # of a model whose logits hardly depend on anything
_SINGLE_ALONE = 1e-8  # where float16 has no KL to go by
# Rounding to float16 at other places costs another KL, but one of the same size.
_HALF_OF_HALF = 10.0


def with_verdict(report: Report) -> Report:
    """The report with its sentences."""
    # What is wrong with a file that nobody here planned is asked before where it runs.
    faults = _fault_problems(report)
    first, then = [], faults
    if report.foreign is not None:
        first, then = [*report.foreign.tensors, *faults], _foreign_problems(report, report.foreign)
    problems = [
        *first, *_fusion_problems(report), *_placement_problems(report), *_number_problems(report), *then,
        *reference_problems(report.references),
    ]  # fmt: skip
    return concluded(report, problems, _facts(report))


def concluded(report: Report, problems: Sequence[str], facts: Sequence[str]) -> Report:
    """The report with its grade, and its sentences in their order: problems, limits that are missed, grade, facts."""
    quality = graded(report)
    said = [] if quality is None else [quality.sentence]
    missed = [gate.sentence for gate in report.gates if not gate.passed]
    return report.model_copy(update={
        "problems": tuple(problems), "quality": quality, "verdict": (*problems, *missed, *said, *facts),
    })  # fmt: skip


def _fusion_problems(report: Report) -> list[str]:
    unfused, moved = report.placement.unfused, report.layers.moved
    sentences = []
    if unfused:
        listed = _listed([f"{u.name} ({u.found or 'nothing'} instead of {u.expected})" for u in unfused])
        what = "layer" if report.placement.convolutions else "linear"
        sentences.append(f"{_count(len(unfused), what)} not fused: {listed}")
    if moved and report.foreign is None:  # a file of roundings around floats shows its values in this way only
        sentences.append(_measured_elsewhere(moved))
    return sentences


def _measured_elsewhere(moved: Sequence[Unfused]) -> str:
    listed = _listed([f"{u.name} ({u.found or 'nothing'} instead of {u.expected})" for u in moved])
    return f"{_count(len(moved), 'linear')} measured on another operator than the deployed one: {listed}"


def _placement_problems(report: Report) -> list[str]:
    place = report.placement
    others = {p: n for p, n in place.nodes_per_provider.items() if p != place.provider}
    return [f"{n} nodes run on {p} instead of {place.provider}" for p, n in others.items()]


def _number_problems(report: Report) -> list[str]:
    rows = [*report.layers.linears, *report.layers.blocks, *report.outputs]
    broken = [row.name for row in rows if row.max_abs_error is None]
    sentences = [f"NaN or Inf comes out of {_listed(broken)}"] if broken else []
    if report.logits is not None and report.logits.nonfinite_tokens:
        sentences.append(
            f"the logits of {report.logits.nonfinite_tokens} of {report.logits.tokens} tokens hold NaN or Inf"
        )
    return sentences


def reference_problems(references: Sequence[Reference]) -> list[str]:
    """Sentences about float models lowered like the export that are not the float model, up to rounding."""
    half = next((r.logits.kl_mean for r in references if r.name == HALF), None)
    sentences = []
    for found in references:
        kl, bound = found.logits.kl_mean, _explained(found.name, half)
        if bound is not None and (kl is None or kl > bound):
            sentences.append(
                f"without any quantization the lowered model is not the float model either: KL of {found.name} is "
                f"{number(kl)}, and rounding explains {bound:.1g} at most"
            )
    return sentences


def _explained(name: str, half: float | None) -> float | None:
    """The largest mean KL that rounding explains; None where nothing is known of it.

    Args:
        name: of a `Reference`.
        half: mean KL of float16 in PyTorch.
    """
    if name == HALF:
        return None
    if "float32" in name:
        return _SINGLE_ALONE if half is None else max(_SINGLE_OF_HALF * half, _SINGLE_FLOOR)
    return None if half is None else _HALF_OF_HALF * half


def _fault_problems(report: Report) -> list[str]:
    """What rounding does not explain; operators that are not the planned ones have sentences of their own."""
    unfused = {found.name for found in report.placement.unfused}
    # Of a foreign file what is known of the weights themselves comes before what shows in values.
    sure = {row.name for row in report.foreign.weights if row.fault} if report.foreign else set()
    rows = sorted(faulty(report.layers.linears), key=lambda row: row.name not in sure)
    return [f"{row.name}: {row.fault}" for row in rows if row.name not in unfused]


def _foreign_problems(report: Report, foreign: Foreign) -> list[str]:
    """What is wrong in a foreign file besides faults: values that no weight explains, and products left out."""
    lost = [row for row in worst_first(report.layers.linears) if not row.fault and rank(row) < _LOST]
    sentences = [
        f"{row.name} makes other values than the float one of what it reads: an SQNR of {decibels(own(row), row)}, and "
        "its weight does not explain it" for row in lost
    ]  # fmt: skip
    sentences += foreign.unfused
    if foreign.missing:
        sentences.append(f"no product of the file computes {_listed(list(foreign.missing))}")
    return sentences


def _foreign_facts(foreign: Foreign) -> list[str]:
    """What can be said of a file that another tool wrote, without running it."""
    ways = ", ".join(f"{n} by {how}" for how, n in foreign.matched.items() if n)
    facts = [f"{foreign.file} was written by {foreign.tool}; linears were found in it: {ways}"]
    grids = [row for row in foreign.weights if row.nearest_db is not None and row.sqnr_db is not None]
    if grids:
        worst = min(grids, key=lambda row: row.sqnr_db or 0.0)
        facts.append(
            f"the weights of {_count(len(grids), 'linear').rsplit(' ', 1)[0]} have a median SQNR of "
            f"{statistics.median(row.sqnr_db or 0.0 for row in grids):.1f} dB, and the nearest codes on their scales "
            f"would have {statistics.median(row.nearest_db or 0.0 for row in grids):.1f}; the lowest is {worst.name}, "
            f"{worst.sqnr_db:.1f} dB"
        )
    beyond = [row for row in grids if (row.unexplained or 0.0) > _BEYOND]
    if beyond:
        most = max(beyond, key=lambda row: row.unexplained or 0.0)
        facts.append(
            f"rounding does not explain {most.unexplained:.0%} of the error of the weight of {most.name}"
            + (f", nor more than {_BEYOND:.0%} of that of {len(beyond) - 1} more" if len(beyond) > 1 else "")
        )
    if scaled := [row.name for row in foreign.weights if row.factors]:
        facts.append(f"the weights of {_listed(scaled, 3)} carry factors that something in front of them divides by")
    if foreign.others:
        facts.append(f"{len(foreign.others)} products with codes belong to no linear of the float model: "
                     f"{_listed(list(foreign.others), 3)}")  # fmt: skip
    return [*facts, *foreign.notes]


def _time(report: Report) -> list[str]:
    """Where the time of a prompt and of a step goes."""
    layers, parts = report.layers, []
    for what, by_op, shares in (
        ("a prompt", layers.time_by_op, [row.time_share for row in layers.linears]),
        ("a step", layers.step_time_by_op, [row.step_time_share for row in layers.linears]),
    ):
        known = [share for share in shares if share is not None]
        if by_op and len(known) == len(shares):
            attention = sum(share for op, share in by_op.items() if op in ATTENTION)
            what = "a run" if report.logits is None else what
            linears = sum(known) + by_op.get(QMOE, 0.0) + by_op.get(STATIC_LSTM, 0.0)
            parts.append(f"{linears:.0%} of the time of {what} ({attention:.0%} are attention)")
    return [f"quantized linears take {' and '.join(parts)}"] if parts else []


def costliest(report: Report) -> list[str]:
    """Which linears cost the most, and what overrides promise."""
    found = report.sensitivity
    costly = [row for row in report.layers.linears if row.kl_cost is not None]
    if found is None or found.kl_mean is None or not costly:
        return []
    worst = max(costly, key=lambda row: row.kl_cost or 0.0)
    restored = found.measured.get(worst.name)
    experts = " but experts" if QMOE in report.placement.kernels else ""
    fall = "" if restored is None else f"; with its value restored to float KL falls by {number(restored)} there"
    # No second mean KL: that of fewer tokens is another number, and here a yardstick for estimates only.
    trust = f"{found.kl_foretold / found.kl_mean:.0%}" if found.kl_foretold is not None and found.kl_mean else "no part"
    part = f"{worst.kl_cost / found.kl_foretold:.0%}" if worst.kl_cost and found.kl_foretold else "nothing"
    facts = [
        f"{worst.name} costs the most KL, {part} of the estimates for all linears{experts}, which add up to {trust} of "
        f"what was measured on their {found.tokens} tokens{fall}"
    ]
    if found.overrides:
        best = found.overrides[0]
        facts.append(
            f"{best.scheme} instead of {best.instead_of} in {best.match} would buy back the most for a byte: about "
            f"{number(best.kl_gain)} for {best.more_bytes:,} bytes"
        )
    return facts


def _values(report: Report) -> list[str]:
    """What comes out of attentions, and what static scales cut off."""
    facts = []
    if report.layers.attentions:
        lowest = min(report.layers.attentions, key=lambda row: math.inf if row.sqnr_db is None else row.sqnr_db)
        worst = worst_first(report.layers.attentions)[0]
        lossy = f"; of its own errors {worst.name} has {decibels(own(worst), worst)}" if rank(worst) < _EXACT else ""
        facts.append(
            f"what comes out of {lowest.name} has the lowest SQNR of the attentions, "
            f"{decibels(lowest.sqnr_db, lowest)}{lossy}"
        )
    clipped = [found for found in report.layers.ranges if (found.clipped or 0) >= _CLIPPED]
    if clipped:
        most = max(clipped, key=lambda found: found.clipped or 0.0)
        others = f"; {len(clipped)} values have more than {_CLIPPED:.1%} there" if len(clipped) > 1 else ""
        facts.append(
            f"{most.clipped:.2%} of what {_listed(list(most.linears), 3)} read is beyond its static scale{others}"
        )
    return facts


def _facts(report: Report) -> list[str]:
    facts = [*(_foreign_facts(report.foreign) if report.foreign else ()), *report.warnings]
    if report.foreign and report.layers.moved:
        facts.append(_measured_elsewhere(report.layers.moved))
    total = sum(report.placement.kernels.values()) + report.placement.convolutions
    if total and not report.placement.unfused:
        facts.append(f"all {kernels(report.placement)}")
    for kernel in (QMOE, STATIC_LSTM):
        if inside := report.placement.kernels.get(kernel):
            facts.append(
                f"{_count(inside, 'linear')} inside {kernel}, which makes no value of each to compare: the SQNR of "
                "their blocks covers them"
            )
    if report.placement.prompt_kernels:
        facts.append("what was measured are prompts; steps of a few tokens have numbers of their own")
    if report.layers.linears:
        order = sorted(report.layers.linears, key=rank)
        median = statistics.median_low(map(rank, order))
        others = f"; the median linear has {median:.1f} dB" if math.isfinite(median) else ""
        facts.append(f"{order[0].name} has the lowest SQNR, {decibels(own(order[0]), order[0])}{others}")
    facts += _values(report)
    if report.layers.blocks:
        last = report.layers.blocks[-1]
        facts.append(f"after all blocks the SQNR is {decibels(last.sqnr_db, last)}")
    if report.activations:
        counts = Counter(a.what for a in report.activations).most_common()
        facts.append("quantized activations: " + ", ".join(f"{n} {what}" for what, n in counts))
    measured = [(a.kernel, a) for a in report.activations if a.kernel is not None]
    if measured:
        most, largest = max(measured, key=lambda pair: pair[0])
        facts.append(
            f"rounding makes {statistics.mean(kernel for kernel, _ in measured):.1%} of the quantized activations "
            f"zero, most ({most:.1%}, {largest.kernel_without_zeros:.1%} of those not zero anyway) in front of "
            f"{_listed(list(largest.linears), 3)}"
        )
    facts += _time(report)
    if report.logits is not None and report.logits.kl_mean is not None:
        scores = report.logits
        note = " (text without a standard: not to be compared with published perplexities)" if report.own_text else ""
        facts.append(
            f"perplexity goes from {number(scores.float_perplexity)} to {number(scores.perplexity)}{note}; "
            f"KL is {number(scores.kl_mean)} a token, and {scores.top1_agreement:.1%} of the likeliest tokens agree"
        )
        facts += _by_margin(scores)
        kl = report.logits.kl_mean
        if scores.perplexity is not None and scores.float_perplexity is not None:
            facts.append(_degradation(scores.perplexity / scores.float_perplexity - 1, kl))
        facts += beside_half(kl, report.references)
        if (far := scores.farthest) is not None and far.kl:
            facts.append(
                f"the largest KL, {number(far.kl)}, is at token {far.token} of window {far.window}, after "
                f"{far.context[-40:]!r}: float finds {far.float_likeliest!r} likeliest, quantized {far.likeliest!r}"
            )
    if report.greedy is not None:
        facts.append(_greedy(report.greedy))
    if report.reader is not None:
        facts.append(f"the reference: {report.reader.sentence()}")
    facts += report.left_out
    facts += costliest(report)
    facts += [f"output {row.name} has {decibels(row.sqnr_db, row)}" for row in report.outputs]
    return facts


def _by_margin(scores: Logits) -> list[str]:
    """How much of the disagreement lies where the float model itself is unsure."""
    if scores.margin_separates is None or len(scores.by_margin) < 2:
        return []
    first, last = scores.by_margin[0], scores.by_margin[-1]
    return [
        f"of tokens whose two likeliest are within {first.most:.0%} for the float model {first.differ:.1%} differ, "
        f"of those it is surer of than {last.least:.0%} {last.differ:.1%}; a token that differs has the smaller margin "
        f"in {scores.margin_separates:.0%} of pairs with one that does not"
    ]


def beside_half(kl: float, references: Sequence[Reference]) -> list[str]:
    """What a KL means beside that of the model in float16, if that was measured."""
    half = next((r.logits for r in references if r.name == HALF), None)
    if half is None:
        return []
    if half.kl_mean is None:
        return [f"the model itself fails in float16: {half.nonfinite_tokens} of {half.tokens} tokens give NaN or Inf"]
    if kl <= half.kl_mean:
        return [f"KL is no larger than that of {HALF} ({number(half.kl_mean)}): a difference that means nothing"]
    if not half.kl_mean:
        return [f"{HALF} gives what float32 gives, so that any difference means something"]
    times = kl / half.kl_mean
    many = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    return [f"KL is {many} times that of {HALF} ({number(half.kl_mean)}), the smallest difference that means anything"]


def _greedy(found: Greedy) -> str:
    prompts = f"{found.prompts} prompt{'' if found.prompts == 1 else 's'} of {found.prompt_tokens} tokens"
    least, most = min(found.agreed), max(found.agreed)
    if least == found.new_tokens:
        return f"greedily both models write the same {found.new_tokens} tokens after {prompts}"
    span = f"{least}" if least == most else f"{least} to {most}"
    return f"greedily both models write the same {span} of {found.new_tokens} tokens after {prompts} before they part"


def _degradation(change: float, kl: float) -> str:
    """A relative change of perplexity in words and in a class.

    Where perplexity falls, the errors happen to suit the text, which is no gain. KL then says what the rise would be:
    of the float model's own text the negative log-likelihood grows by it on average.
    """
    if change >= 0:
        return f"perplexity rises by {change:.1%}: {degradation_class(change)}"
    rise = math.expm1(kl)
    return (
        f"perplexity falls by {-change:.1%}, which is chance and no gain: by KL, which is worth a rise of {rise:.1%}, "
        f"it is {degradation_class(rise)}"
    )


def degradation_class(rise: float) -> str:
    """ZeroQuant-V2's classes (arXiv 2303.08302) of a relative rise in perplexity.

    The paper's bounds are rises of 0.1 and 0.5 of perplexities near 10; a text or model with another one has its own.
    """
    if rise <= 0.01:
        return "Class-1 of ZeroQuant-V2 (up to 1 %: hardly any degradation)"
    return f"Class-{2 if rise <= 0.05 else 3} of ZeroQuant-V2 ({'1 to' if rise <= 0.05 else 'above'} 5 %)"


def _count(n: int, what: str) -> str:
    return f"{n} {what} is" if n == 1 else f"{n} {what}s are"


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
