"""Two validated exports side by side."""

import math
from dataclasses import dataclass
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
    rows = [{row.name: row for row in e.report.layers.linears} for e in (first, second)]
    sizes = [{linear.name: linear.bytes for linear in e.manifest.linears} for e in (first, second)]
    both = [(row, rows[1][name]) for name, row in rows[0].items() if name in rows[1]]
    only = tuple(tuple(n for n in mine if n not in other) for mine, other in (rows, rows[::-1]))
    return Comparison(
        (str(first.folder), str(second.folder)), tuple(_measures(first, second)),
        tuple(_pair(rows, sizes) for rows in sorted(both, key=_gain)), only, tuple(_notes(first, second)),
    )  # fmt: skip


def _gain(rows: tuple[ValueComparison, ValueComparison]) -> float:
    """By how much the second is better, with infinities; equally broken or equally exact ones differ by nothing."""
    first, second = map(rank, rows)
    return 0.0 if first == second else second - first


def _pair(rows: tuple[ValueComparison, ValueComparison], sizes: list[dict[str, int]]) -> Pair:
    name, found = rows[0].name, tuple(own(row) for row in rows)
    difference = None if None in found else found[1] - found[0]
    schemes = tuple(row.scheme for row in rows)
    return Pair(name, schemes, found, difference, _gain(rows) < 0, tuple(s.get(name) for s in sizes))


def _measures(first: Exported, second: Exported) -> list[Measure]:
    reports = first.report, second.report
    found = []
    for name, field, style in _LOGITS:
        values = tuple(getattr(r.logits, field) if r.logits else None for r in reports)
        if any(v is not None for v in values):
            found.append(Measure(name, *values, tuple("" if v is None else style(v) for v in values)))
    for name in dict.fromkeys(row.name for r in reports for row in r.outputs):
        values = tuple(next((row.sqnr_db for row in r.outputs if row.name == name), None) for r in reports)
        found.append(Measure(f"output {name}, SQNR", *values, tuple(map(_decibels, values))))
    ends = tuple(r.layers.blocks[-1].sqnr_db if r.layers.blocks else None for r in reports)
    if any(v is not None for v in ends):
        found.append(Measure("SQNR behind all blocks", *ends, tuple(map(_decibels, ends))))
    lowest = tuple(_lowest(r) for r in reports)
    if any(v is not None for v in lowest):
        found.append(Measure("lowest own SQNR of a linear", *lowest, tuple(map(_decibels, lowest))))
    for part in dict.fromkeys([*first.manifest.bytes, *second.manifest.bytes]):
        values = first.manifest.bytes.get(part), second.manifest.bytes.get(part)
        words = tuple("" if v is None else megabytes(v) for v in values)
        if any(values):
            found.append(Measure(f"bytes, {part.replace('_', ' ')}", *values, words))
    counts = tuple(len(r.problems) for r in reports)
    return [*found, Measure("problems", *counts, tuple(map(str, counts)))]


_LOGITS = (
    ("KL, mean", "kl_mean", number), ("KL, median", "kl_median", number), ("KL, 99 %", "kl_p99", number),
    ("same likeliest token", "top1_agreement", "{:.1%}".format), ("likeliest five", "top5_agreement", "{:.1%}".format),
    ("perplexity", "perplexity", number), ("perplexity, float", "float_perplexity", number),
)  # fmt: skip


def _lowest(report: Report) -> float | None:
    finite = [value for row in report.layers.linears if math.isfinite(value := rank(row))]
    return min(finite, default=None)


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _notes(first: Exported, second: Exported) -> list[str]:
    a, b = first.report, second.report
    notes = []
    if a.text != b.text:
        notes.append(f"They were validated on different text, so KL and perplexity do not compare: {a.text}; {b.text}")
    if first.model != second.model:
        notes.append(f"The float models have different names: {first.model}; {second.model}")
    return notes
