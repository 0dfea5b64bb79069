"""Two validated exports side by side."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..formatting import megabytes
from ..validation.formatting import number, own, rank
from ..validation.report import Report, ValueComparison
from .exported import Exported


@dataclass(frozen=True)
class Measure:
    """A measure of both exports; None where one has none. text: both in words."""

    name: str
    first: float | None
    second: float | None
    text: tuple[str, str]


@dataclass(frozen=True)
class Pair:
    """A linear of both exports.

    Attributes:
        schemes, own_sqnr_db, bytes: of both; None: not known, or no number.
        difference: own SQNR of the second less that of the first; None where it is no number.
        worse: the second is worse, NaN and Inf worse than any number and equal values better.
    """

    name: str
    schemes: tuple[str, str]
    own_sqnr_db: tuple[float | None, float | None]
    difference: float | None
    worse: bool
    bytes: tuple[int | None, int | None]


@dataclass(frozen=True)
class Comparison:
    """Two exports: measures, linears with the one that got worse by the most first, and what to mind.

    Attributes:
        linears: those that both quantized; only: names of those that one alone did.
        notes: sentences on why numbers may not compare.
    """

    folders: tuple[str, str]
    measures: tuple[Measure, ...]
    linears: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "folders": list(self.folders),
            "measures": [{"name": m.name, "first": m.first, "second": m.second} for m in self.measures],
            "linears": [
                {
                    "name": p.name, "schemes": list(p.schemes), "own_sqnr_db": list(p.own_sqnr_db),
                    "difference": p.difference, "bytes": list(p.bytes),
                }
                for p in self.linears
            ],
            "only": [list(names) for names in self.only],
            "notes": list(self.notes),
        }  # fmt: skip


def compare_exports(first: Exported, second: Exported) -> Comparison:
    """Compare two validated exports of one model, or of two."""
    rows = [{row.name: row for row in e.validation.layers.linears} for e in (first, second)]
    sizes = [{linear.name: linear.bytes for linear in e.manifest.linears} for e in (first, second)]
    both = [(row, rows[1][name]) for name, row in rows[0].items() if name in rows[1]]
    only = tuple(n for n in rows[0] if n not in rows[1]), tuple(n for n in rows[1] if n not in rows[0])
    return Comparison(
        (str(first.folder), str(second.folder)), tuple(_measures(first, second)),
        tuple(_pair(rows, sizes) for rows in sorted(both, key=_gain)), only, tuple(_notes(first, second)),
    )  # fmt: skip


def _gain(rows: tuple[ValueComparison, ValueComparison]) -> float:
    """By how much the second is better, with infinities; equally broken or equally exact ones differ by nothing."""
    first, second = map(rank, rows)
    return 0.0 if first == second else second - first


def _pair(rows: tuple[ValueComparison, ValueComparison], sizes: list[dict[str, int]]) -> Pair:
    (first, second), name = rows, rows[0].name
    before, after = own(first), own(second)
    difference = None if before is None or after is None else after - before
    schemes, taken = (first.scheme, second.scheme), (sizes[0].get(name), sizes[1].get(name))
    return Pair(name, schemes, (before, after), difference, _gain(rows) < 0, taken)


def _measures(first: Exported, second: Exported) -> list[Measure]:
    found: list[Measure] = []
    reports = first.validation, second.validation

    def add(name: str, of: Callable[[Report], float | None], style: Callable[[float], str], *, always: bool) -> None:
        one, other = map(of, reports)
        if always or one is not None or other is not None:
            found.append(_measure(name, one, other, style))

    for name, field, style in _LOGITS:
        add(name, partial(_of_logits, field), style, always=False)
    for name in dict.fromkeys(row.name for r in reports for row in r.outputs):
        add(f"output {name}, SQNR", partial(_of_output, name), _decibels, always=True)
    add("SQNR behind all blocks", _behind_all, _decibels, always=False)
    add("lowest own SQNR of a linear", _lowest, _decibels, always=False)
    for part in dict.fromkeys([*first.manifest.bytes, *second.manifest.bytes]):
        one, other = first.manifest.bytes.get(part), second.manifest.bytes.get(part)
        if one or other:
            found.append(_measure(f"bytes, {part.replace('_', ' ')}", one, other, megabytes))
    return [*found, _measure("problems", len(reports[0].problems), len(reports[1].problems), str)]


def _measure(name: str, first: float | None, second: float | None, style: Callable[[Any], str]) -> Measure:
    words = "" if first is None else style(first), "" if second is None else style(second)
    return Measure(name, first, second, words)


def _of_logits(field: str, report: Report) -> float | None:
    value: float | None = getattr(report.logits, field) if report.logits else None
    return value


def _of_output(name: str, report: Report) -> float | None:
    return next((row.sqnr_db for row in report.outputs if row.name == name), None)


def _behind_all(report: Report) -> float | None:
    return report.layers.blocks[-1].sqnr_db if report.layers.blocks else None


_LOGITS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("KL, mean", "kl_mean", number), ("KL, median", "kl_median", number), ("KL, 99 %", "kl_p99", number),
    ("same likeliest token", "top1_agreement", "{:.1%}".format), ("likeliest five", "top5_agreement", "{:.1%}".format),
    ("perplexity", "perplexity", number), ("perplexity, float", "float_perplexity", number),
)  # fmt: skip


def _lowest(report: Report) -> float | None:
    finite = [value for row in report.layers.linears if math.isfinite(value := rank(row))]
    return min(finite, default=None)


def _decibels(value: float) -> str:
    return f"{value:.1f} dB"


def _notes(first: Exported, second: Exported) -> list[str]:
    a, b = first.validation, second.validation
    notes = []
    if a.text != b.text:
        notes.append(f"They were validated on different text, so KL and perplexity do not compare: {a.text}; {b.text}")
    if first.model != second.model:
        notes.append(f"The float models have different names: {first.model}; {second.model}")
    return notes
