"""Which figures a validation has: from its rows to heat maps, lines and bars. What was not measured is not drawn."""

import math
import statistics
from collections.abc import Callable, Sequence

from ..validation.formatting import decibels, own
from ..validation.formatting import number as _number
from ..validation.report import InputRange, LayerComparison, Logits, Report, Sensitivity, ValueComparison
from .curve import curve_figure
from .exported import Exported
from .figures import Bar, Bars, Cell, Figure, HeatMap, Lines, Point, Series

_MOST_BARS = 16
_FLOAT = 100.0  # dB: above this there is nothing but the rounding of float32
_Worded = tuple[str, str, bool] | None  # text of a cell, the same in words, whether it is broken; None: no cell
# Above this many kinds of values a heat map is longer than anybody reads.
_MOST_ROWS = 64


def figures_of(exported: Exported) -> list[Figure]:
    """Every figure of a validated export: those of its report, and the curve that it was chosen from."""
    size = exported.manifest.bytes.get("model")
    curve = [] if exported.curve is None else with_numbers(curve_figure(exported.curve, size))
    return [*figures(exported.validation), *curve]


def figures(report: Report) -> list[Figure]:
    """Every figure of a report, in reading order."""
    found: list[Figure] = [*heat_maps(report.layers.linears), *depth(report.layers)]
    if report.logits is not None:
        found += [*by_position(report.logits), *by_margin(report.logits)]
    return [*found, *costs(report), *greedy(report), *ranges(report.layers.ranges)]


def heat_maps(linears: Sequence[ValueComparison]) -> list[HeatMap]:
    """Own SQNR, inherited SQNR and cost in KL by layer and projection; none for a model without repeated layers."""
    blocks = list(dict.fromkeys(row.block for row in linears))
    kinds = list(dict.fromkeys(kind(row) for row in linears))
    shared = [k for k in kinds if sum(kind(row) == k for row in linears) > 1]
    if len(blocks) < 2 or not shared or len(kinds) > _MOST_ROWS:
        return []
    maps = [
        _map(linears, blocks, kinds, "own", "Own error", (
            "SQNR in dB of the errors that each linear makes itself, on inputs of the deployed model. Low is bad; the "
            "layer that broke stands out."
        ), own, _in_decibels, low_is_bad=True),
        _map(linears, blocks, kinds, "inherited", "With inherited error", (
            "SQNR in dB of the same values with the errors of everything in front of them."
        ), lambda row: row.sqnr_db, _in_decibels, low_is_bad=True),
    ]  # fmt: skip
    if any(row.kl_cost is not None for row in linears):
        maps.append(_map(linears, blocks, kinds, "cost", "Cost in KL", (
            "What the error of each linear adds to the mean KL, in thousandths of a nat a token: an estimate, by the "
            "Fisher metric of the float model."
            " Colours are on a logarithmic scale."
        ), lambda row: row.kl_cost, _in_thousandths, low_is_bad=False, log=True))  # fmt: skip
    return maps


def kind(row: ValueComparison) -> str:
    """The name of a row without the block it is in: `self_attn.q_proj`."""
    return row.name.removeprefix(f"{row.block}.") if row.block else row.name


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of dotted names, as few as tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return [end if last.count(end) == 1 else name for end, name in zip(last, names, strict=True)]


def block_labels(blocks: Sequence[str]) -> list[str]:
    """Numbers of layers; the name of a block that has none."""
    return [end if (end := block.rpartition(".")[2]).isdigit() else block for block in blocks]


def _map(
    linears: Sequence[ValueComparison], blocks: list[str], kinds: list[str], key: str, title: str, caption: str,
    value: Callable[[ValueComparison], float | None],
    worded: Callable[[ValueComparison, float | None], _Worded], *, low_is_bad: bool, log: bool = False,
) -> HeatMap:  # fmt: skip
    numbers = [v for row in linears if (v := value(row)) is not None and (v > 0 or not log)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)
    cells = {}
    for row in linears:
        number = value(row)
        if (words := worded(row, number)) is not None:
            text, said, broken = words
            share = _share(number, low, high, low_is_bad, log) if number is not None else float(broken)
            cells[kinds.index(kind(row)), blocks.index(row.block)] = Cell(share, text, said, broken)
    ends = [_end(low, key), _end(high, key)]
    best, worst = reversed(ends) if low_is_bad else ends
    return HeatMap(
        key, title, caption, tuple(short_names(kinds)), tuple(block_labels(blocks)), cells, best, worst
    )  # fmt: skip


def _share(value: float, low: float, high: float, low_is_bad: bool, log: bool) -> float:
    if high == low:
        return 0.0
    if log:
        value, low, high = (math.log(max(number, low)) for number in (value, low, high))
    share = (value - low) / (high - low)
    return 1 - share if low_is_bad else share


def _end(value: float, key: str) -> str:
    return f"{value * 1000:.3g}" if key == "cost" else f"{value:.0f} dB"


def _in_decibels(row: ValueComparison, value: float | None) -> _Worded:
    broken = value is None and row.max_abs_error != 0
    text = f"{value:.1f}" if value is not None else "NaN" if broken else "="
    scheme = f" ({row.scheme})" if row.scheme else ""
    return text, f"{row.name}{scheme}: {decibels(value, row)}", broken


def _in_thousandths(row: ValueComparison, value: float | None) -> _Worded:
    return None if value is None else (f"{value * 1000:.1f}", f"{row.name}: {value:.3g} of the mean KL", False)


def depth(layers: LayerComparison) -> list[Lines]:
    """SQNR of what every block hands on; layers stand at their number, what comes before and after them beside it."""
    if len(layers.blocks) < 2:
        return []
    labels = block_labels([row.name for row in layers.blocks])
    first = next((i for i, label in enumerate(labels) if label.isdigit()), 0)

    def line(name: str, value: Callable[[ValueComparison], float | None], quiet: bool) -> Series:
        points = []
        for index, row in enumerate(layers.blocks):
            number = value(row)
            drawn = None if number is None or number > _FLOAT else number
            points.append(Point(index - first, drawn, f"{row.name}: {decibels(number, row)}"))
        return Series(name, tuple(points), quiet)

    series = (
        line("all errors so far", lambda row: row.sqnr_db, False),
        line("of this block only", lambda row: row.own_sqnr_db, True),
    )
    return with_numbers(Lines(
        "depth", "Error along the model", (
            "SQNR of what each block hands on. A step down is a block that adds much; one that computes in float has "
            "no error of its own to draw."
        ), "layer", "dB", series,
    ))  # fmt: skip


def costs(report: Report) -> list[Bars]:
    """What the most expensive linears cost in KL, as estimated; behind them what was measured and has no estimate."""
    priced = [(row, row.kl_cost) for row in report.layers.linears if row.kl_cost is not None]
    priced.sort(key=lambda pair: -pair[1])
    rows = [row for row, _ in priced]
    whole = report.sensitivity
    falls = {} if whole is None else {name: fall for name, fall in whole.measured.items() if fall is not None}
    drawn = [
        Bar(label, f"{row.name}: estimated {cost:.4g}{_restored(falls.get(row.name))}", cost)
        for label, (row, cost) in zip(_bar_labels(rows[:_MOST_BARS]), priced, strict=False)
    ]
    linears, known = {row.name for row in report.layers.linears}, {row.name for row in rows}
    others = [name for name in falls if name not in known]
    for name in others:
        short, what = (name, name) if name in linears else ("embedding", f"the quantized embedding, in {name}")
        drawn.append(Bar(f"{short}, measured", f"{what}: no estimate{_restored(falls[name])}", falls[name], apart=True))
    if not drawn:
        return []
    caption = "What the error of each linear adds to the mean KL, as estimated by the Fisher metric of the float model."
    if whole is not None:
        caption += _beside_measured(whole)
    if others:
        caption += (
            f" The {'bar' if len(others) == 1 else 'bars'} of another colour: no estimate, but by how much KL "
            "falls when that alone is restored to float, measured among the errors of all others."
        )
    return [Bars("cost", "What single linears cost", caption, "nats a token", tuple(drawn))]


def _bar_labels(rows: Sequence[ValueComparison]) -> list[str]:
    """`29.mlp.down_proj`: the layer and what it is there; the whole name where that does not tell rows apart."""
    short = [
        f"{block}.{kind(row)}" if kind(row) != row.name else row.name
        for block, row in zip(block_labels([row.block for row in rows]), rows, strict=True)
    ]
    return [label if short.count(label) == 1 else row.name for label, row in zip(short, rows, strict=True)]


def _restored(fall: float | None) -> str:
    if fall is None:
        return ""
    return f"; restored to float, KL {'falls' if fall >= 0 else 'rises'} by {abs(fall):.4g} (measured)"


def _beside_measured(whole: Sensitivity) -> str:
    """All estimates as a part of what they should add up to, which says how far to trust them.

    Both are of the tokens that costs are measured on, fewer than those of the mean KL of this page.
    """
    if whole.kl_foretold is None or not whole.kl_mean:
        return f" On {whole.tokens} tokens."
    part = whole.kl_foretold / whole.kl_mean
    return (
        f" On {whole.tokens} tokens of the text all estimates add up to {part:.0%} of what "
        "was measured there: the further from 100 %, the more the estimates are guesses."
    )


def by_position(logits: Logits) -> list[Lines]:
    """KL along the window."""
    parts = logits.kl_by_position
    if len(parts) < 2:
        return []
    width = (logits.window - 1) / len(parts)
    points = tuple(
        Point((i + 0.5) * width, kl, f"tokens {int(i * width)} to {int((i + 1) * width)}: KL {_number(kl)}")
        for i, kl in enumerate(parts)
    )
    over = "one window" if logits.windows == 1 else f"{logits.windows} windows"
    caption = f"Mean over {over}. Rising: errors grow in the cache."
    return with_numbers(Lines(
        "position", "KL along the text", caption, "token", "KL", (Series("KL", points),), from_zero=True
    ))  # fmt: skip


def by_margin(logits: Logits) -> list[Bars]:
    """How often the likeliest token changes, by how sure the float model is of it."""
    if len(logits.by_margin) < 2:
        return []
    bars = tuple(
        Bar(f"{part.least:g} to {part.most:g}", f"{part.tokens:,} tokens: {part.differ:.2%} differ", part.differ * 100)
        for part in logits.by_margin
    )
    caption = (
        "Tokens by margin: the probability of the float model's likeliest token minus that of the second one. Where it "
        "is small another token is likeliest with little error."
    )
    return [Bars("margin", "Where the likeliest token changes", caption, "% of tokens", bars)]


def greedy(report: Report) -> list[Bars]:
    """How long greedy continuations stay together."""
    if report.greedy is None or not report.greedy.agreed:
        return []
    g = report.greedy
    bars = tuple(
        Bar(f"prompt {i + 1}", f"prompt {i + 1}: {n} of {g.new_tokens} tokens alike", n) for i, n in enumerate(g.agreed)
    )
    median = statistics.median_low(g.agreed)
    caption = f"Tokens until the two part, of {g.new_tokens}; prompts of {g.prompt_tokens}. The median is {median}."
    return [Bars("greedy", "Greedy continuations alike", caption, "tokens", bars[: 2 * _MOST_BARS])]


def ranges(found: Sequence[InputRange]) -> list[Lines]:
    """Largest magnitude of the inputs of linears along the model, for each kind of input."""
    groups: dict[tuple[str, ...], list[InputRange]] = {}
    for item in found:
        ends = tuple(name.rpartition(".")[2] for name in item.linears)
        groups.setdefault(ends, []).append(item)
    drawn: list[Lines] = []
    for ends, items in groups.items():
        if len(items) < 2:
            continue
        before = tuple(Point(i, r.float_absmax, _range_title(r)) for i, r in enumerate(items))
        after = tuple(Point(i, r.absmax, _range_title(r)) for i, r in enumerate(items))
        title, caption = f"Into {', '.join(ends)}", _clipping(items)
        drawn += with_numbers(Lines(
            f"range_{len(drawn)}", title, caption, "layer", "largest magnitude",
            (Series("float model", before, True), Series("deployed", after)), log=True,
        ))  # fmt: skip
    return drawn


def _range_title(item: InputRange) -> str:
    parts = [f"{item.block}: {_number(item.float_absmax)} in the float model, {_number(item.absmax)} deployed"]
    if item.spread is not None and item.float_spread is not None:
        parts.append(f"largest channel over the median one {item.float_spread:.3g}, deployed {item.spread:.3g}")
    if item.clipped is not None:
        parts.append(f"{item.clipped:.2%} clipped")
    return "; ".join(parts)


def _clipping(items: Sequence[InputRange]) -> str:
    known = [(r.clipped, r.block) for r in items if r.clipped is not None]
    if not known:
        return ""
    most, where = max(known)
    return f"Most clipped by its static scale: {most:.2%} in {where}." if most else "Nothing is clipped."


def with_numbers(figure: Lines) -> list[Lines]:
    """The figure, if any of its lines has a number to show."""
    values = (p.y for s in figure.series for p in s.points)
    return [figure] if any(y is not None and math.isfinite(y) and (y > 0 or not figure.log) for y in values) else []
