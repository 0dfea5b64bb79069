"""The rows of a report as one table: what people sort and filter."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..validation.report import Report, ValueComparison


@dataclass(frozen=True)
class Column:
    """A column; number: aligned to the right and sorted by value; title: what it means."""

    name: str
    number: bool = False
    title: str = ""


@dataclass(frozen=True)
class TableCell:
    """What is shown, and the number behind it; value None: text, or nothing to sort by. bad: something to repair."""

    text: str
    value: float | None = None
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows; columns in which nothing stands are left out."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def _text(read: Callable[[ValueComparison], str], row: ValueComparison) -> TableCell:
    return TableCell(read(row))


def _number(read: Callable[[ValueComparison], float | None], style: str, row: ValueComparison) -> TableCell:
    value = read(row)
    return TableCell("", None) if value is None else TableCell(style.format(value), float(value))


def _megabytes(row: ValueComparison) -> float | None:
    return None if row.bytes is None else row.bytes / 1e6


# The first three decide where to look, so they stand beside the name.
_NUMBERS: tuple[tuple[str, str, str, Callable[[ValueComparison], float | None]], ...] = (
    ("own SQNR", "{:.1f}", "dB, of the errors made here only", lambda r: r.own_sqnr_db),
    ("SQNR", "{:.1f}", "dB, with the errors of everything in front", lambda r: r.sqnr_db),
    ("KL cost", "{:.5f}", "estimate of what the error made here adds to the mean KL", lambda r: r.kl_cost),
    ("cosine", "{:.5f}", "of the angle between both values", lambda r: r.cosine),
    ("max error", "{:.3g}", "largest absolute difference", lambda r: r.max_abs_error),
    ("MB", "{:.3f}", "in the file", _megabytes),
    ("bits", "{:.2f}", "for each weight", lambda r: r.bits),
    ("time %", "{:.2f}", "of a run over the validation prompt",
     lambda r: None if r.time_share is None else 100 * r.time_share),
    ("branch dB", "{:.1f}", "by how much the low-rank branch lowers the weight's error", lambda r: r.branch_gain_db),
)  # fmt: skip


_NOTES = "rescaled: smoothing may have divided output channels, so it is compared up to one factor for each"


def values(report: Report) -> Table:
    """Every linear, attention, block and output."""
    unfused = {u.name: u.found or "nothing" for u in (*report.placement.unfused, *report.layers.moved)}
    kinds = (
        ("linear", report.layers.linears), ("attention", report.layers.attentions), ("block", report.layers.blocks),
        ("output", report.outputs),
    )  # fmt: skip
    what = {id(row): name for name, rows in kinds for row in rows}
    found = [row for _, rows in kinds for row in rows]
    numbers = [(Column(n, True, title), partial(_number, read, style)) for n, style, title, read in _NUMBERS]
    readers = [
        (Column("name"), partial(_text, lambda row: row.name)),
        *numbers[:3],
        (Column("note", title=_NOTES), partial(_note, unfused)),
        (Column("what"), partial(_text, lambda row: what[id(row)])),
        (Column("scheme"), partial(_text, lambda row: row.scheme)),
        *numbers[3:],
        (Column("kernel"), partial(_text, lambda row: row.kernel)),
        (Column("on"), partial(_text, lambda row: row.provider.removesuffix("ExecutionProvider"))),
    ]
    return _kept([column for column, _ in readers], [[read(row) for _, read in readers] for row in found])


def inputs(report: Report) -> Table:
    """What the inputs of linears reach."""
    numbers = (
        ("float, largest", "{:.4g}", "largest magnitude in the float model", "float_absmax"),
        ("deployed, largest", "{:.4g}", "largest magnitude in the deployed model", "absmax"),
        ("float, spread", "{:.3g}", "largest channel over the median channel", "float_spread"),
        ("deployed, spread", "{:.3g}", "the same in the deployed model", "spread"),
        ("clipped %", "{:.3f}", "outside of the range of the static scale", "clipped"),
    )  # fmt: skip
    rows = []
    for item in report.layers.ranges:
        ends = ", ".join(name.rpartition(".")[2] for name in item.linears)
        cells = [TableCell(f"{item.block}: {ends}")]
        for _, style, _, field in numbers:
            value = getattr(item, field)
            value = value * 100 if value is not None and field == "clipped" else value
            cells.append(TableCell("") if value is None else TableCell(style.format(value), value))
        rows.append(cells)
    return _kept([Column("input of"), *(Column(n, True, title) for n, _, title, _ in numbers)], rows)


def _note(unfused: dict[str, str], row: ValueComparison) -> TableCell:
    notes = []
    if row.name in unfused:
        notes.append(f"runs as {unfused[row.name]}")
    if row.max_abs_error is None:
        notes.append("NaN or Inf")
    elif row.max_abs_error == 0:
        notes.append("equal")
    if row.rescaled:
        notes.append("rescaled")
    return TableCell("; ".join(notes), bad=row.name in unfused or row.max_abs_error is None)


def _kept(columns: list[Column], rows: list[list[TableCell]]) -> Table:
    used = [i for i in range(len(columns)) if i == 0 or any(row[i].text for row in rows)]
    return Table(tuple(columns[i] for i in used), tuple(tuple(row[i] for i in used) for row in rows))
