"""Numbers of a report in words for people."""

import math
from collections.abc import Iterable

from .report import Placement, Report, ValueComparison


def summary_rows(report: Report) -> list[tuple[str, str, str]]:
    """(measure, value, what it means) for a table."""
    rows = [("reference", report.reference, "the float model"), ("text", report.text, "what both models read")]
    if (read := report.reader) is not None:
        rows.insert(1, ("reference checked by", read.short(), "who else read the float model, and how far it is off"))
    if report.quality is not None:
        rows.insert(0, ("quality", report.quality.grade, "by the limits in the first sentences below"))
    if (scores := report.logits) is not None:
        kl = with_error(scores.kl_mean, scores.kl_error)
        relative = with_error(scores.relative_perplexity, scores.relative_perplexity_error)
        same = share(scores.top1_agreement, scores.top1_error)
        rows += [
            ("perplexity, float", number(scores.float_perplexity), f"over {scores.tokens} predicted tokens"),
            ("perplexity, quantized", number(scores.perplexity), "of the deployed file; lower is better"),
            ("relative perplexity", relative, "quantized over float; 1 is equal"),
            ("KL mean", kl, "how far the predictions move, per token; 0 is equal"),
            ("KL median / 99 %", f"{number(scores.kl_median)} / {number(scores.kl_p99)}", "of single tokens"),
            ("top-1 agreement", same, "both find the same next token likeliest"),
        ]
        if scores.top5_agreement is not None:
            rows.append(
                ("top-5 agreement", f"{scores.top5_agreement:.1%}", "of the five likeliest, how many are so for both")
            )
    for other in report.references:
        kl, same = number(other.logits.kl_mean), f"{other.logits.top1_agreement:.1%}"
        rows.append((other.name, f"KL {kl}, top-1 {same}", "the float model itself, beside float32 in PyTorch"))
    if (texts := report.greedy) is not None:
        alike = f"{', '.join(map(str, texts.agreed))} of {texts.new_tokens}"
        rows.append(("greedy tokens alike", alike, "for each prompt, before both models' texts part"))
    for row in report.outputs:
        rows.append((f"output {row.name}", decibels(row.sqnr_db, row), "SQNR over all inputs"))
        rows += [(f"{what}, {row.name}", value, meaning) for what, value, meaning in decided(row)]
    if report.layers.linears:
        worst = worst_first(report.layers.linears)[0]
        rows.append(
            ("worst linear", f"{worst.name}, {decibels(own(worst), worst)}", "SQNR of the errors it makes itself")
        )
    nodes = ", ".join(f"{n} on {p}" for p, n in report.placement.nodes_per_provider.items())
    rows.append(("kernels", kernels(report.placement), "what became of the quantized linears"))
    rows.append(("nodes", nodes, "where ONNX Runtime runs the graph"))
    return rows


def decided(row: ValueComparison) -> list[tuple[str, str, str]]:
    """(measure, value, what it means) of what an output decides; empty where that is nothing."""
    rows = []
    if row.same_choice is not None:
        what = "both find the same class likeliest" if row.choice_kl is not None else "both say yes, or both no"
        rows.append(("same choice", f"{row.same_choice:.1%} of {row.choices}", what))
    if row.choice_kl is not None:
        rows.append(("KL mean", number(row.choice_kl), "how far the classes' probabilities move; 0 is equal"))
    if row.row_cosine is not None:
        rows.append(("cosine of rows", f"{row.row_cosine:.5f}", "each embedding beside the float one, their mean"))
    if row.rank_correlation is not None:
        what = "similarities of all pairs" if row.row_cosine is not None else "scores"
        rows.append(("rank correlation", f"{row.rank_correlation:.4f}", f"Spearman's, of the {what}; 1: same order"))
    return rows


def worst_first(rows: Iterable[ValueComparison]) -> list[ValueComparison]:
    """Rows by the errors made in them alone: not finite first, then those with a fault; within, ascending own SQNR."""
    return sorted(rows, key=lambda row: (row.max_abs_error is not None, not row.fault, rank(row)))


def faulty(rows: Iterable[ValueComparison]) -> list[ValueComparison]:
    """Those with errors that rounding does not explain, worst first."""
    return [row for row in worst_first(rows) if row.fault]


def worst_linears(report: Report, most: int = 10) -> list[tuple[str, str, str, str, str]]:
    """(linear, own SQNR, bits a weight, kernel, share of a prompt's time) of the worst ones, for a table."""
    return [
        (
            row.name, decibels(own(row), row), "" if row.bits is None else f"{row.bits:.2f}", row.kernel,
            "" if row.time_share is None else f"{row.time_share:.1%}",
        )
        for row in worst_first(report.layers.linears)[:most]
    ]  # fmt: skip


def own(row: ValueComparison) -> float | None:
    """The SQNR of a row that counts: of its own errors, where that is known."""
    return row.own_sqnr_db if row.own_sqnr_db is not None else row.sqnr_db


def rank(row: ValueComparison) -> float:
    """The same with the infinities and NaN (as minus infinity) that JSON lacks."""
    if (value := own(row)) is not None:
        return value
    # A nonzero error beside a zero signal is an SQNR of minus infinity.
    return math.inf if row.max_abs_error == 0 else -math.inf


def decibels(value: float | None, row: ValueComparison) -> str:
    """An SQNR of `row` for people; of integers and truth values how many are equal."""
    if row.equal_share is not None:
        return f"{row.equal_share:.1%} of its elements equal"
    if value is not None:
        return f"{value:.1f} dB"
    return "NaN or Inf" if row.max_abs_error is None else "equal" if row.max_abs_error == 0 else "no signal"


def kernels(placement: Placement) -> str:
    """What the quantized linears and convolutions run as."""
    total, convolutions = sum(placement.kernels.values()), placement.convolutions
    others = f"{convolutions} quantized convolutions run as QLinearConv" if convolutions else ""
    if not total:
        return others or "no quantized linears"
    text = f"{total} quantized linears run as {_counted(placement.kernels)}"
    text += f", for prompts as {_counted(placement.prompt_kernels)}" if placement.prompt_kernels else ""
    return f"{text}, {others}" if others else text


def _counted(kernels: dict[str, int]) -> str:
    return next(iter(kernels)) if len(kernels) == 1 else ", ".join(f"{k} ({n})" for k, n in kernels.items())


def number(value: float | None) -> str:
    """Four digits, for people."""
    return "not finite" if value is None else f"{value:.4g}"


def with_error(value: float | None, error: float | None) -> str:
    """`0.0812 ± 0.0031`: as many digits as the standard error leaves; four without one."""
    if value is None or not error:
        return number(value)
    digits = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits < 7 else f"{number(value)} ± {error:.2g}"


def share(value: float | None, error: float | None) -> str:
    """The same of a share, in percent."""
    if value is None:
        return "not finite"
    return f"{value:.1%}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
