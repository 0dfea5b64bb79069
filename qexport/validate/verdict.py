"""A report in plain sentences: first what has to be repaired, then what was measured."""

import math
import statistics
from collections import Counter

from .report import Report
from .wording import decibels, kernels, number, own, rank, worst_first


def with_verdict(report: Report) -> Report:
    """The report with its sentences."""
    problems = [*_fusion_problems(report), *_placement_problems(report), *_number_problems(report)]
    return report.model_copy(update={"problems": tuple(problems), "verdict": (*problems, *_facts(report))})


def _fusion_problems(report: Report) -> list[str]:
    unfused, moved = report.placement.unfused, report.layers.moved
    sentences = []
    if unfused:
        listed = _listed([f"{u.name} ({u.found or 'nothing'} instead of {u.expected})" for u in unfused])
        sentences.append(f"{_count(len(unfused), 'linear')} not fused: {listed}")
    if moved:
        listed = _listed([f"{u.name} ({u.found or 'nothing'} instead of {u.expected})" for u in moved])
        sentences.append(f"{_count(len(moved), 'linear')} measured on another operator than the deployed one: {listed}")
    return sentences


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


def _facts(report: Report) -> list[str]:
    facts = []
    total = sum(report.placement.kernels.values())
    if total and not report.placement.unfused:
        facts.append(f"all {kernels(report.placement)}")
    if report.placement.prompt_kernels:
        facts.append("what was measured are prompts; steps of a few tokens have numbers of their own")
    if report.layers.linears:
        order = worst_first(report.layers.linears)
        median = statistics.median_low(map(rank, order))
        others = f"; the median linear has {median:.1f} dB" if math.isfinite(median) else ""
        facts.append(f"{order[0].name} has the lowest SQNR, {decibels(own(order[0]), order[0])}{others}")
    if report.layers.blocks:
        last = report.layers.blocks[-1]
        facts.append(f"behind all blocks the SQNR is {decibels(last.sqnr_db, last)}")
    if report.activations:
        counts = Counter(a.what for a in report.activations).most_common()
        facts.append("quantized activations: " + ", ".join(f"{n} {what}" for what, n in counts))
    measured = [a for a in report.activations if a.kernel is not None]
    if measured:
        largest = max(measured, key=lambda a: a.kernel)
        facts.append(
            f"rounding makes {statistics.mean(a.kernel for a in measured):.1%} of the quantized activations zero, most "
            f"({largest.kernel:.1%}, {largest.kernel_without_zeros:.1%} of those not zero anyway) in front of "
            f"{_listed(list(largest.linears), 3)}"
        )
    if report.logits is not None and report.logits.kl_mean is not None:
        scores = report.logits
        note = " (text without a standard: not to be compared with published perplexities)" if report.own_text else ""
        facts.append(
            f"perplexity goes from {number(scores.float_perplexity)} to {number(scores.perplexity)}{note}; "
            f"KL is {number(scores.kl_mean)} a token, and {scores.top1_agreement:.1%} of the likeliest tokens agree"
        )
        if scores.perplexity is not None:
            rise = scores.perplexity - scores.float_perplexity
            facts.append(f"perplexity rises by {rise:.2f}: {degradation_class(rise)}")
    facts += [f"output {row.name} has {decibels(row.sqnr_db, row)}" for row in report.outputs]
    return facts


def degradation_class(rise: float) -> str:
    """ZeroQuant-V2's classes (arXiv 2303.08302) of a rise in perplexity: up to 0.1, up to 0.5, and above."""
    if rise <= 0.1:
        return "Class-1 (up to 0.1: hardly any degradation)"
    return "Class-2 (0.1 to 0.5)" if rise <= 0.5 else "Class-3 (above 0.5)"


def _count(n: int, what: str) -> str:
    return f"{n} {what} is" if n == 1 else f"{n} {what}s are"


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
