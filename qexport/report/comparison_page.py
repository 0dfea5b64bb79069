"""comparison.html: two validated exports in one file, for whoever has to choose."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ..artifact.scratch import write_whole
from ..validation.formatting import number, with_error
from ..validation.report import Logits, Report
from . import facts, svg
from .comparing import Comparison, Pair
from .drawing import with_numbers
from .exported import Exported
from .figures import Bar, Bars, Lines, Point, Series
from .html import environment, own_file, sha256
from .tables import Column, Table, TableCell

COMPARISON_FILE = "comparison.html"
_FLOAT = 100.0  # dB: above this there is nothing but the rounding of float32
_MOST_BARS = 16


def write_comparison(found: Comparison, first: Exported, second: Exported, path: Path | None = None) -> Path:
    """Write the page, by rename; returns its path.

    Args:
        path: of the page; None: comparison.html in the second folder.

    Raises:
        InputError: it cannot be written.
    """
    page = path or second.folder / COMPARISON_FILE
    write_whole(page, render_comparison(found, first, second))
    return page


def render_comparison(found: Comparison, first: Exported, second: Exported) -> str:
    """The page of a comparison."""
    style, script = own_file("style.css"), own_file("report.js")
    called = names(first, second)
    sides = list(zip(called, (first.validation, second.validation), strict=True))
    return environment().get_template("comparison.html").render(
        model=second.model, names=called, found=found,
        qualities=[facts.quality(exported.validation) for exported in (first, second)], text=second.validation.text,
        style=Markup(style), script=Markup(script), style_hash=sha256(style), script_hash=sha256(script),
        charts=[(figure, svg.lines(figure), svg.styles(figure)) for figure in (*depth(sides), *positions(sides))],
        bars=[(figure, svg.bars(figure), []) for figure in differences(found)], linears=linear_table(found.linears),
        paired=[
            (test.name, with_error(test.difference, test.error), f"{test.p:.2g}", test.shown) for test in found.paired
        ],
        windows=found.paired[0].windows if found.paired else 0,
    )  # fmt: skip


def names(first: Exported, second: Exported) -> list[str]:
    """What tells both apart in a few words: recipe names, or names of the folders where recipes are the same."""
    recipes = [first.recipe_name, second.recipe_name]
    if all(recipes) and recipes[0] != recipes[1]:
        return recipes
    folders = [first.folder.resolve().name, second.folder.resolve().name]
    return folders if folders[0] != folders[1] else [f"{folders[0]} (first)", f"{folders[1]} (second)"]


def depth(sides: Sequence[tuple[str, Report]]) -> list[Lines]:
    """SQNR of what every block hands on, of both."""
    series = []
    for name, report in sides:
        points = tuple(
            Point(i, row.sqnr_db if row.sqnr_db is not None and row.sqnr_db <= _FLOAT else None,
                  f"{name}, {row.name}: {number(row.sqnr_db)} dB")
            for i, row in enumerate(report.layers.blocks)
        )  # fmt: skip
        series.append(Series(name, points))
    caption = "SQNR of what each block hands on, with all errors so far: higher is better."
    return with_numbers(Lines("depth", "Error along the model", caption, "block", "dB", tuple(series)))


def positions(sides: Sequence[tuple[str, Report]]) -> list[Lines]:
    """KL along the window, of both."""
    found = [
        Series(name, _along(name, report.logits))
        for name, report in sides
        if report.logits is not None and len(report.logits.kl_by_position) > 1
    ]
    caption = "Mean over windows. Rising: errors grow in the cache."
    figure = Lines("position", "KL along the text", caption, "token", "KL", tuple(found), from_zero=True)
    return with_numbers(figure) if found else []


def _along(name: str, logits: Logits) -> tuple[Point, ...]:
    width = (logits.window - 1) / len(logits.kl_by_position)
    return tuple(
        Point((i + 0.5) * width, kl, f"{name}, around token {int((i + 0.5) * width)}: KL {number(kl)}")
        for i, kl in enumerate(logits.kl_by_position)
    )


def differences(found: Comparison) -> list[Bars]:
    """The linears whose own SQNR differs most, whichever is better."""
    known = [(pair, pair.difference) for pair in found.linears if pair.difference]
    known.sort(key=lambda item: -abs(item[1]))
    bars = tuple(
        Bar(pair.name.removeprefix("model.layers."), f"{pair.name}: {_side(pair, 0)}, {_side(pair, 1)}", difference,
            apart=difference < 0)
        for pair, difference in known[:_MOST_BARS]
    )  # fmt: skip
    if not bars:
        return []
    caption = "Own SQNR of the second less that of the first, in dB; bars of another colour are linears that got worse."
    return [Bars("linears", "Linears that differ most", caption, "dB", bars)]


def _side(pair: Pair, which: int) -> str:
    return f"{number(pair.own_sqnr_db[which])} dB ({pair.schemes[which]})"


def linear_table(pairs: tuple[Pair, ...]) -> Table:
    """Every linear of both."""
    titles = ("own SQNR", "own SQNR, second", "difference", "bytes", "bytes, second")
    columns = (
        Column("linear"), Column("scheme"), Column("scheme, second"), *(Column(title, True) for title in titles)
    )  # fmt: skip
    rows = []
    for pair in pairs:
        decibels = [_cell(value, "{:.1f}") for value in (*pair.own_sqnr_db, pair.difference)]
        sizes = [_cell(value, "{:,}") for value in pair.bytes]
        rows.append((TableCell(pair.name), *map(TableCell, pair.schemes), *decibels, *sizes))
    return Table(columns, tuple(rows))


def _cell(value: float | None, style: str) -> TableCell:
    return TableCell("" if value is None else style.format(value), None if value is None else float(value))

