"""Figures as SVG for a page: shapes carry classes, and the page's style gives them colours, by day and by night."""

from collections.abc import Sequence
from math import log10

from markupsafe import Markup, escape

from .figures import Bars, HeatMap, Lines, Point, Series
from .scales import log_ticks, short, spread, step, ticks, whole_ticks, widened

_WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 22, 36
_CHARACTER = 6.2  # mean width at the size of labels
_NAME, _MOST_NAME = 12, 16  # height of a name at the end of a line, and its letters
_SAMPLE = (6, 26)  # where a piece of the line begins in front of its name, and where it ends
_DASHES = 6  # patterns of quiet lines


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; children and attributes are escaped, `_` in attributes becomes `-`, and a final one goes away."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    inside = "".join(str(escape(child)) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>")


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _svg(width: float, height: float, title: str, *children: object, scale: bool = True) -> Markup:
    size = {} if scale else {"width": width, "height": height}
    return tag(
        "svg", tag("title", title), *children, viewBox=f"0 0 {_short(float(width))} {_short(float(height))}",
        role="img", aria_label=title, **size,
    )  # fmt: skip


def lines(figure: Lines, width: int = _WIDTH, height: int = 232) -> Markup:
    """Lines over a common axis, each point with its words."""
    shown = [p.x for s in figure.series for p, _ in _drawn(s.points, figure.log)]
    x_low, x_high = min(shown), max(shown)
    y_low, y_high = widened(_reached(figure), from_zero=figure.from_zero, log=figure.log)
    x_ends = (x_low, x_high) if x_high > x_low else (x_low - 0.5, x_high + 0.5)
    right: float = _RIGHT
    if figure.named:
        right += min(max(len(_cut(s.name, _MOST_NAME)) for s in figure.series) * _CHARACTER + _SAMPLE[1], 0.4 * width)
        height = max(height, _TOP + _BOTTOM + _NAME * len(figure.series))
    axis = _Axes(x_ends, (y_low, y_high), figure.log, width, height, right)
    parts = [tag("text", figure.y_label, x=2, y=11, class_="label")]
    for y in log_ticks(y_low, y_high) if figure.log else ticks(y_low, y_high):
        at = axis.y(y)
        parts.append(tag("line", x1=_LEFT, x2=width - right, y1=at, y2=at, class_="rule"))
        parts.append(tag("text", short(y), x=_LEFT - 7, y=at + 3.5, class_="tick end"))
    for x in (whole_ticks if figure.counted else ticks)(*x_ends):
        parts.append(tag("text", short(x), x=axis.x(x), y=height - _BOTTOM + 16, class_="tick middle"))
    parts.append(tag("text", figure.x_label, x=(_LEFT + width - right) / 2, y=height - 4, class_="label middle"))
    names = _names(figure, axis, width - right, height) if figure.named else [Markup("")] * len(figure.series)
    drawn = list(zip(figure.series, styles(figure), names, strict=True))
    # What is quiet lies below.
    for series, style, name in sorted(drawn, key=lambda item: not item[0].quiet):
        parts.append(_line(series, axis, figure.log, style, name))
    return _svg(width, height, figure.title, *parts)


def _reached(figure: Lines) -> list[float]:
    """Every value that has to be on the y axis: points, and the ends of errors that are drawn."""
    found = []
    for series in figure.series:
        for p, y in _drawn(series.points, figure.log):
            error = 0.0 if series.quiet or (figure.log and p.error >= y) else p.error
            found += [y - error, y + error]
    return found


def _drawn(points: Sequence[Point], log: bool) -> list[tuple[Point, float]]:
    """The points that have a place on the y axis, with their values."""
    return [(p, p.y) for p in points if p.y is not None and (p.y > 0 or not log)]


def _names(figure: Lines, axis: "_Axes", left: float, height: float) -> list[Markup]:
    """The name of each line behind its last point, moved where names would lie on each other."""
    ends = [(i, drawn[-1]) for i, s in enumerate(figure.series) if (drawn := _drawn(s.points, figure.log))]
    places = spread([axis.y(y) for _, (_, y) in ends], _NAME, _TOP, height - _BOTTOM)
    found = [Markup("")] * len(figure.series)
    for (i, (end, value)), y in zip(ends, places, strict=True):
        name = figure.series[i].name
        found[i] = (
            tag("line", x1=axis.x(end.x), y1=axis.y(value), x2=left + _SAMPLE[0], y2=y, class_="lead")
            + tag("path", d=f"M{left + _SAMPLE[0]:.1f} {y:.1f}H{left + _SAMPLE[1] - 3:.1f}")
            + tag("text", tag("title", name), _cut(name, _MOST_NAME), x=left + _SAMPLE[1], y=y + 3.5, class_="end-name")
        )
    return found


def styles(figure: Lines) -> list[str]:
    """The classes of each line: `line0`, `line1` and so on, or `quiet`, with a pattern where lines are named."""
    found, loud, quiet = [], 0, 0
    for series in figure.series:
        if series.quiet:
            found.append(f"quiet dash{quiet % _DASHES}" if figure.named else "quiet")
        else:
            found.append(f"line{loud % 4}")
        loud, quiet = loud + (not series.quiet), quiet + series.quiet
    return found


class _Axes:
    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], log: bool, width: int, height: int, right: float
    ):
        self._x, self._y, self._log, self._width, self._height, self._right = x, y, log, width, height, right

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (self._width - _LEFT - self._right)

    def y(self, value: float) -> float:
        low, high = self._y
        if self._log:
            low, high, value = log10(low), log10(high), log10(value)
        return self._height - _BOTTOM - (value - low) / (high - low) * (self._height - _TOP - _BOTTOM)


def _line(series: Series, axis: _Axes, log: bool, style: str, name: Markup) -> Markup:
    pieces: list[list[tuple[Point, float]]] = [[]]
    for p in series.points:
        if p.y is None or (log and p.y <= 0):
            pieces.append([])
        else:
            pieces[-1].append((p, p.y))
    paths = [
        tag("path", d="M" + "L".join(f"{axis.x(p.x):.1f} {axis.y(y):.1f}" for p, y in piece))
        for piece in pieces
        if len(piece) > 1
    ]
    dots = [
        # A wide ring around the dot takes the pointer, so that its words are easy to get.
        tag("g", tag("title", p.title), tag("circle", cx=axis.x(p.x), cy=axis.y(y), r=7, class_="near"),
            tag("circle", cx=axis.x(p.x), cy=axis.y(y), r=2.2))
        for piece in pieces
        for p, y in piece
    ]  # fmt: skip
    errors = [
        tag("line", x1=axis.x(p.x), x2=axis.x(p.x), y1=axis.y(y - p.error), y2=axis.y(y + p.error), class_="error")
        for piece in pieces
        for p, y in piece
        if p.error and not series.quiet and not (log and p.error >= y)
    ]
    return tag("g", name, *paths, *errors, *dots, class_=f"series {style}")


def bars(figure: Bars) -> Markup:
    """Horizontal bars with their names in front and their values behind."""
    left = min(max(len(_cut(bar.label)) for bar in figure.bars) * _CHARACTER + 20, 195)
    right, row, top = 52, 21, 4
    high = max(max(bar.value for bar in figure.bars), 0.0)
    low = min(min(bar.value for bar in figure.bars), 0.0)
    room, span = _WIDTH - left - right, (high - low) or 1.0
    zero = left - low / span * room
    parts = []
    for index, bar in enumerate(figure.bars):
        y, wide = top + index * row, abs(bar.value) / span * room
        x = zero if bar.value >= 0 else zero - wide
        parts.append(tag(
            "g", tag("title", bar.title), tag("text", _cut(bar.label), x=left - 8, y=y + 13, class_="tick end name"),
            tag("rect", x=x, y=y + 3, width=max(wide, 1.0), height=row - 7, rx=1.5,
                class_="bar apart" if bar.apart else "bar"),
            tag("text", f"{bar.value:.3g}", x=max(x + wide, zero) + 6, y=y + 13, class_="tick"),
        ))  # fmt: skip
    height = top + row * len(figure.bars) + 20
    parts.append(tag("text", figure.x_label, x=left + room / 2, y=height - 4, class_="label middle"))
    return _svg(_WIDTH, height, figure.title, *parts)


def _cut(label: str, most: int = 28) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"


def heat_map(figure: HeatMap) -> tuple[Markup, Markup]:
    """The names of the rows, and the cells: two images, so that the names stay while the cells scroll."""
    count = len(figure.columns)
    wide = min(max(1040 / max(count, 1), 16.0), 64.0)
    high, top = 27, 22
    height = top + high * len(figure.rows) + 2
    names = [
        tag("text", tag("title", name), _cut(name, 20), x=0, y=top + i * high + 17, class_="tick name")
        for i, name in enumerate(figure.rows)
    ]
    stride = 1 if max(map(len, figure.columns), default=0) * _CHARACTER + 4 <= wide else 5
    numbers = [
        tag("text", name, x=(j + 0.5) * wide, y=13, class_="tick middle")
        for j, name in enumerate(figure.columns)
        if (name.isdigit() and int(name) % stride == 0) or (not name.isdigit() and len(name) * _CHARACTER <= wide)
    ]
    cells = []
    for (i, j), cell in figure.cells.items():
        style = "broken" if cell.broken else f"q{step(cell.badness)}"
        inside = [tag("title", cell.title), tag("rect", x=j * wide + 1, y=top + i * high + 1, width=wide - 2,
                                                height=high - 2, rx=2)]  # fmt: skip
        if len(cell.text) * 5.6 + 4 <= wide:
            inside.append(tag("text", cell.text, x=(j + 0.5) * wide, y=top + i * high + 17.5, class_="middle"))
        cells.append(tag("g", *inside, class_=f"cell {style}"))
    side = max(len(_cut(name, 20)) for name in figure.rows) * _CHARACTER + 12
    return (
        _svg(side, height, f"{figure.title}: names of the rows", *names, scale=False),
        _svg(count * wide, height, figure.title, *numbers, *cells, scale=False),
    )
