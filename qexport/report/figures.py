"""The figures of a report as data: what is drawn, before anybody decides with which lines and colours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map.

    Attributes:
        badness: 0 (best of the map) to 1 (worst), for its colour.
        text: the value in a few characters; title: the same in words.
        broken: the value is not finite.
    """

    badness: float
    text: str
    title: str
    broken: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values by projection (rows) and layer (columns).

    Attributes:
        key: name for files and anchors; title, caption: for people.
        cells: by (row, column); places without a value are missing.
        best, worst: the ends of the colour scale, in words.
    """

    key: str
    title: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], Cell]
    best: str
    worst: str


@dataclass(frozen=True)
class Point:
    """A point of a line; y None: there is no number, the line breaks. title: the point in words; error: of y, or 0."""

    x: float
    y: float | None
    title: str
    error: float = 0.0


@dataclass(frozen=True)
class Series:
    """A line; quiet: it is there for comparison, and the errors of its points are not drawn."""

    name: str
    points: tuple[Point, ...]
    quiet: bool = False


@dataclass(frozen=True)
class Lines:
    """One or more lines over a common axis.

    Attributes:
        key, title, caption: as of a `HeatMap`.
        log: a logarithmic y axis; values of 0 and below are left out. from_zero: the y axis begins at 0.
        counted: x counts something, so that its ticks are whole numbers.
        named: each line has its name at its end, as so many lines need; else a legend has them.
    """

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log: bool = False
    from_zero: bool = False
    counted: bool = True
    named: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with its name, the same in full, and its value; apart: that is another quantity than the other bars'."""

    label: str
    title: str
    value: float
    apart: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, in the order of `bars`."""

    key: str
    title: str
    caption: str
    x_label: str
    bars: tuple[Bar, ...]


Figure = HeatMap | Lines | Bars
