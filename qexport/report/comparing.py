"""Two validated exports side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from typing import Any

import torch

from ..formatting import html_table, megabytes
from ..validation.bootstrap import sign_flip_p, standard_error
from ..validation.formatting import number, own, rank, share, with_error
from ..validation.quality import rank_of
from ..validation.report import Logits, Report, ValueComparison
from . import facts
from .exported import Exported
from .speed import Speed


@dataclass(frozen=True)
class Measure:
    """A measure of both exports.

    Attributes:
        first, second: None where one has none. text: both in words.
        better: 1 or 2, which is the better one; 0 where neither is, or nobody can say.
    """

    name: str
    first: float | None
    second: float | None
    text: tuple[str, str]
    better: int = 0


@dataclass(frozen=True)
class Paired:
    """A measure of both exports on the same windows of the same text, window by window.

    Attributes:
        difference: second less first; error: its standard error by a bootstrap over windows.
        p: how likely so large a difference is where there is none, by flipping signs of windows; see `bootstrap`.
        windows: how many.
    """

    name: str
    difference: float
    error: float | None
    p: float
    windows: int

    @property
    def shown(self) -> bool:
        """Whether the windows show that there is a difference."""
        return self.p < _SIGNIFICANT


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


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two exports: measures, linears with the one that got worse by the most first, and what to mind.

    Attributes:
        linears: those that both quantized; only: names of those that one alone did.
        notes: sentences on why numbers may not compare.
        paired: see its class; empty where they were not validated on the same windows.
        verdict: what follows, in sentences.
    """

    folders: tuple[str, str]
    measures: tuple[Measure, ...]
    linears: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]
    paired: tuple[Paired, ...] = ()
    verdict: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Comparison of {self.folders[0]} and {self.folders[1]}: {'; '.join(self.verdict) or 'no verdict'}>"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, then the measures side by side."""
        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in (*self.verdict, *self.notes))
        return said + html_table(("measure", *self.folders), [(m.name, *m.text) for m in self.measures])

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "folders": list(self.folders),
            "measures": [asdict(measure) for measure in self.measures],
            "linears": [
                {
                    "name": p.name, "schemes": list(p.schemes), "own_sqnr_db": list(p.own_sqnr_db),
                    "difference": p.difference, "bytes": list(p.bytes),
                }
                for p in self.linears
            ],
            "only": [list(names) for names in self.only],
            "notes": list(self.notes),
            "paired": [asdict(paired) for paired in self.paired],
            "verdict": list(self.verdict),
        }  # fmt: skip


def compare_exports(first: Exported, second: Exported) -> Comparison:
    """Compare two validated exports of one model, or of two."""
    rows = [{row.name: row for row in e.validation.layers.linears} for e in (first, second)]
    sizes = [{linear.name: linear.bytes for linear in e.manifest.linears} for e in (first, second)]
    both = [(row, rows[1][name]) for name, row in rows[0].items() if name in rows[1]]
    only = tuple(n for n in rows[0] if n not in rows[1]), tuple(n for n in rows[1] if n not in rows[0])
    measures, paired = tuple(_measures(first, second)), tuple(paired_tests(first.validation, second.validation))
    return Comparison(
        (str(first.folder), str(second.folder)), measures,
        tuple(_pair(rows, sizes) for rows in sorted(both, key=_gain)), only, tuple(_notes(first, second, bool(paired))),
        paired, tuple(_verdict(measures, paired)),
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

    def add(
        name: str, of: Callable[[Report], float | None], style: Callable[[float], str], *, good: int = 0,
        always: bool = False,
    ) -> None:  # fmt: skip
        one, other = map(of, reports)
        if always or one is not None or other is not None:
            found.append(_measure(name, one, other, style, good))

    grades = [facts.quality(report) for report in reports]
    if all(grades):
        names = tuple(grade.grade for grade in grades if grade is not None)
        better = _better(rank_of(names[0]), rank_of(names[1]), LOW)
        found.append(Measure("quality", None, None, (names[0], names[1]), better))
    for name, field, error, style, good in _LOGITS:
        (one, said), (other, also) = (_of_logits(report.logits, field, error, style) for report in reports)
        if one is not None or other is not None:
            found.append(Measure(name, one, other, (said, also), _better(one, other, good)))
    for name in dict.fromkeys(row.name for r in reports for row in r.outputs):
        add(f"output {name}, SQNR", partial(_of_output, name), _decibels, good=HIGH, always=True)
    add("SQNR after all blocks", _behind_all, _decibels, good=HIGH)
    add("lowest own SQNR of a linear", _lowest, _decibels, good=HIGH)
    for part in dict.fromkeys([*first.manifest.bytes, *second.manifest.bytes]):
        one, other = first.manifest.bytes.get(part), second.manifest.bytes.get(part)
        if one or other:
            found.append(_measure(f"bytes, {part.replace('_', ' ')}", one, other, megabytes, LOW))
    found += _speeds(first.speed, second.speed)
    found += _tasks(first, second)
    return [*found, _measure("problems", len(reports[0].problems), len(reports[1].problems), str, LOW)]


def _of_logits(
    scores: Logits | None, field: str, error: str, style: Callable[[float, float | None], str]
) -> tuple[float | None, str]:
    """A measure and the same in words."""
    value: float | None = getattr(scores, field, None)
    return value, "" if value is None else style(value, getattr(scores, error) if error else None)


def _speeds(first: Speed | None, second: Speed | None) -> list[Measure]:
    """Of benched exports; which is faster is only said of one machine and equally many threads."""
    if first is None and second is None:
        return []
    alike = first is not None and second is not None and (first.machine, first.threads) == (
        second.machine, second.threads)  # fmt: skip
    found = []

    def add(name: str, of: Callable[[Speed], float | None], style: Callable[[Any], str], good: int) -> None:
        one, other = (None if speed is None else of(speed) for speed in (first, second))
        found.append(_measure(name, one, other, style, good if alike else 0))

    for field, name in (("prefill", "prompt of {} tokens, tokens/s"), ("decode", "decoding after {} tokens, tokens/s")):
        for n in sorted({n for speed in (first, second) if speed is not None for n in getattr(speed, field)}):
            add(name.format(n), partial(_rate, field, n), "{:,.1f}".format, HIGH)
    add("load, seconds", lambda speed: speed.load_seconds, "{:.2f}".format, LOW)
    add("memory", lambda speed: speed.memory_bytes, megabytes, LOW)
    return found


def _rate(field: str, n: int, speed: Speed) -> float | None:
    rate: float | None = getattr(speed, field).get(n)
    return rate


def _tasks(first: Exported, second: Exported) -> list[Measure]:
    scores = [{(s.task, s.metric): s for s in exported.tasks} for exported in (first, second)]
    found = []
    for key in dict.fromkeys([*scores[0], *scores[1]]):
        one, other = scores[0].get(key), scores[1].get(key)
        higher = next((s.higher_is_better for s in (one, other) if s is not None), None)
        good = 0 if higher is None else HIGH if higher else LOW
        (first_value, said), (second_value, also) = (
            (None, "") if s is None else (s.value, with_error(s.value, s.error)) for s in (one, other)
        )
        better = _better(first_value, second_value, good)
        found.append(Measure(f"{key[0]}, {key[1]}", first_value, second_value, (said, also), better))
    return found


def _measure(name: str, first: float | None, second: float | None, style: Callable[[Any], str], good: int) -> Measure:
    words = "" if first is None else style(first), "" if second is None else style(second)
    return Measure(name, first, second, words, _better(first, second, good))


def _better(first: float | None, second: float | None, good: int) -> int:
    """Which of two numbers is better, 1 or 2; 0 where they are equal or one is missing.

    Args:
        good: LOW, HIGH, or 0 for neither.
    """
    if first is None or second is None or first == second or not good:
        return 0
    return 1 if (first < second) == (good == LOW) else 2


def paired_tests(first: Report, second: Report) -> list[Paired]:
    """Both exports window by window; none unless they were validated on the same windows of the same text.

    The float model's own negative log-likelihoods tell that: they are equal on no other text.
    """
    a, b = (report.logits.by_window if report.logits else None for report in (first, second))
    if a is None or b is None or len(a.kl) != len(b.kl) or len(a.kl) < 2 or None in (*a.float_nll, *b.float_nll):
        return []
    if any(abs(x - y) > _SAME_TEXT * abs(y) for x, y in zip(_numbers(a.float_nll), _numbers(b.float_nll), strict=True)):
        return []
    found = []
    for name, field in (("mean KL", "kl"), ("log perplexity", "nll"), ("same likeliest token", "top1")):
        one, other = getattr(a, field), getattr(b, field)
        if None in (*one, *other):
            continue
        difference = torch.tensor(other, dtype=torch.float64) - torch.tensor(one, dtype=torch.float64)
        error = standard_error(difference[:, None], lambda means: means[:, 0])
        found.append(Paired(name, float(difference.mean()), error, sign_flip_p(difference), len(difference)))
    return found


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _verdict(measures: Sequence[Measure], paired: Sequence[Paired]) -> list[str]:
    """What follows for whoever has to choose."""
    said = []
    test = next((test for test in paired if test.name == "mean KL"), None)
    if test is not None and test.difference:
        which = "second" if test.difference < 0 else "first"
        apart = with_error(abs(test.difference), test.error)
        how = f"window by window, over {test.windows} windows: p = {test.p:.2g}"
        said.append(
            f"The {which} is closer to the float model: its mean KL is lower by {apart} ({how})"
            if test.shown
            else f"Which is closer to the float model is not shown: mean KL differs by {apart} ({how})"
        )
    for measure in measures:
        rate = measure.name.endswith(", tokens/s")
        if not (rate or measure.name == "bytes, model") or not measure.better:
            continue
        which, (low, high) = _FIRST_OR_SECOND[measure.better], sorted(_numbers((measure.first, measure.second)))
        if rate:
            said.append(f"The {which} is {high / low:.2f} times as fast: {measure.name.removesuffix(', tokens/s')}")
        else:
            said.append(f"The {which} is smaller: {low / high:.0%} of the bytes of the other")
    return said


_FIRST_OR_SECOND = {1: "first", 2: "second"}


def _of_output(name: str, report: Report) -> float | None:
    return next((row.sqnr_db for row in report.outputs if row.name == name), None)


def _behind_all(report: Report) -> float | None:
    return report.layers.blocks[-1].sqnr_db if report.layers.blocks else None


LOW, HIGH = 1, 2  # which is good
_SIGNIFICANT = 0.05
_SAME_TEXT = 1e-5  # of a negative log-likelihood: float32 in another order of sums


def _plain(value: float, error: float | None) -> str:
    return number(value)


_LOGITS: tuple[tuple[str, str, str, Callable[[float, float | None], str], int], ...] = (
    ("KL, mean", "kl_mean", "kl_error", with_error, LOW), ("KL, median", "kl_median", "", _plain, LOW),
    ("KL, 99 %", "kl_p99", "", _plain, LOW), ("same likeliest token", "top1_agreement", "top1_error", share, HIGH),
    ("likeliest five", "top5_agreement", "", share, HIGH),
    ("relative perplexity", "relative_perplexity", "relative_perplexity_error", with_error, LOW),
    ("perplexity", "perplexity", "", _plain, 0), ("perplexity, float", "float_perplexity", "", _plain, 0),
)  # fmt: skip


def _lowest(report: Report) -> float | None:
    finite = [value for row in report.layers.linears if math.isfinite(value := rank(row))]
    return min(finite, default=None)


def _decibels(value: float) -> str:
    return f"{value:.1f} dB"


def _notes(first: Exported, second: Exported, paired: bool) -> list[str]:
    a, b = first.validation, second.validation
    notes = []
    if a.text != b.text:
        notes.append(f"They were validated on different text, so KL and perplexity do not compare: {a.text}; {b.text}")
    elif not paired and a.logits is not None and b.logits is not None:
        notes.append("No test window by window: one was validated by an older version, on one window, or on other text")
    if first.model != second.model:
        notes.append(f"The float models have different names: {first.model}; {second.model}")
    speeds = first.speed, second.speed
    if all(speeds) and len({(speed.machine, speed.threads) for speed in speeds if speed is not None}) > 1:
        machines = "; ".join(f"{speed.machine}, {speed.threads} threads" for speed in speeds if speed is not None)
        notes.append(f"Their speeds were measured under different conditions and do not compare: {machines}")
    elif any(speeds) and not all(speeds):
        notes.append("One of them was never benched: qexport bench FIRST --against SECOND measures both in turns")
    return notes
