"""The same figures as PNG files, for papers, through matplotlib."""

import importlib
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, writing_to
from .drawing import figures_of
from .exported import Exported
from .figures import Bars, Figure, HeatMap, Lines
from .sampling import Sampled
from .scales import STEPS, short, spread, step

# The light colours of the page.
_STEPS = ("#f9f3e6", "#ebdac0", "#debf9c", "#d2a57b", "#c58a5e", "#b76f46", "#a65534", "#933c26", "#7d241d")
_FAINT = "#68707a"
_LINES, _QUIET, _INK, _BROKEN = ("#1b6ca8", "#b3541e", "#3b7d4f", "#7a4f9a"), "#9aa3ad", "#1c1f23", "#a3261b"
_DASHES = ("-", "--", ":", "-.", (0, (6, 3)), (0, (1, 4)))
_DPI = 200


def write_plots(exported: Exported, folder: str | os.PathLike[str], sampled: Sampled | None = None) -> list[Path]:
    """Write every figure of a validated export into `folder`, made where it is missing; returns the files.

    Args:
        sampled: its figures too.

    Raises:
        InputError: matplotlib is not installed, or the folder cannot be written.
    """
    agg, style = _matplotlib()
    into, written = Path(folder), []
    with writing_to(into, "Free some space"), style:
        try:
            into.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError("is a file, not a folder", place=str(into), remedy="Choose another name") from None
        for figure in [*figures_of(exported), *(sampled.figures if sampled else ())]:
            path = into / f"{_file_name(figure)}.png"
            canvas = _canvas(agg, figure)
            _draw(canvas.figure.add_subplot(), figure)
            canvas.figure.savefig(path, dpi=_DPI, metadata={"Software": None})
            written.append(path)
    return written


def _matplotlib() -> tuple[Any, Any]:
    """The backend that draws without a display, and the style of the figures, for a `with`."""
    try:
        agg, library = importlib.import_module("matplotlib.backends.backend_agg"), importlib.import_module("matplotlib")
    except ImportError:
        raise InputError("plots need matplotlib", remedy="pip install 'qexport[plots]'") from None
    settings = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _QUIET,
        "text.color": _INK, "axes.labelcolor": _INK, "text.parse_math": False, "figure.constrained_layout.use": True,
    }  # fmt: skip
    return agg, library.rc_context(settings)


def _file_name(figure: Figure) -> str:
    return f"map_{figure.key}" if isinstance(figure, HeatMap) else figure.key


def _canvas(agg: Any, figure: Figure) -> Any:
    size = (5.0, 3.1)
    if isinstance(figure, HeatMap):
        size = (min(max(1.4 + 0.3 * len(figure.columns), 4), 24), 0.9 + 0.27 * len(figure.rows))
    if isinstance(figure, Bars):
        size = (5.0, 0.9 + 0.22 * len(figure.bars))
    return agg.FigureCanvasAgg(importlib.import_module("matplotlib.figure").Figure(figsize=size))


def _draw(axes: Any, figure: Figure) -> None:
    axes.set_title(figure.title, loc="left", fontsize=10, fontweight="bold")
    if isinstance(figure, HeatMap):
        _heat_map(axes, figure)
    elif isinstance(figure, Lines):
        _lines(axes, figure)
    else:
        _bars(axes, figure)


def _heat_map(axes: Any, figure: HeatMap) -> None:
    patches = importlib.import_module("matplotlib.patches")
    for (i, j), cell in figure.cells.items():
        at = step(cell.badness)
        fill = "white" if cell.broken else _STEPS[at]
        edge = _BROKEN if cell.broken else "white"
        axes.add_patch(patches.Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=fill, edgecolor=edge, linewidth=0.8))
        ink = _BROKEN if cell.broken else "white" if at >= STEPS - 3 else _INK
        axes.text(j, i, cell.text, ha="center", va="center", fontsize=5, color=ink)
    axes.set_xlim(-0.5, len(figure.columns) - 0.5)
    axes.set_ylim(len(figure.rows) - 0.5, -0.5)
    axes.set_xticks(range(len(figure.columns)), figure.columns, fontsize=6)
    axes.set_yticks(range(len(figure.rows)), figure.rows, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"layer; colours from {figure.best} (light) to {figure.worst} (dark)", fontsize=7)


def _lines(axes: Any, figure: Lines) -> None:
    colours, drawn = iter(_LINES * len(figure.series)), []
    dashes = iter(_DASHES * len(figure.series) if figure.named else ("--",) * len(figure.series))
    for series in figure.series:
        x, y = [p.x for p in series.points], [float("nan") if p.y is None else p.y for p in series.points]
        style = {"color": _QUIET, "linestyle": next(dashes)} if series.quiet else {"color": next(colours), "zorder": 3}
        drawn += axes.plot(x, y, marker="o", markersize=2.5, linewidth=1.3, label=series.name, **style)
        if not series.quiet and any(p.error for p in series.points):
            errors = [p.error for p in series.points]
            axes.errorbar(x, y, errors, fmt="none", elinewidth=0.8, capsize=2, **style)
    if figure.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    if figure.from_zero:
        axes.set_ylim(bottom=0)
    if figure.named:
        _names(axes, figure, drawn)
    elif len(figure.series) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", color="#e4e6e8", linewidth=0.6)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)


def _names(axes: Any, figure: Lines, drawn: list[Any]) -> None:
    """The name of each line behind its last point, moved where names would lie on each other."""
    drawn_points = [[(p.x, p.y) for p in s.points if p.y is not None] for s in figure.series]
    there = [i for i, points in enumerate(drawn_points) if points]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # as they are: what follows is in parts of them
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    places = [to_share(drawn_points[i][-1]) for i in there]
    moved = spread([float(y) for _, y in places], 0.062, 0.0, 1.0)
    beside = {"transform": axes.transAxes, "clip_on": False}
    for i, (x, y), at in zip(there, places, moved, strict=True):
        colour, quiet = drawn[i].get_color(), figure.series[i].quiet
        axes.plot([x, 1.02], [y, at], color=_QUIET, linewidth=0.5, **beside)
        axes.plot([1.02, 1.08], [at, at], color=colour, linestyle=drawn[i].get_linestyle(), linewidth=1.3, **beside)
        ink = _FAINT if quiet else colour
        axes.text(1.09, at, figure.series[i].name, transform=axes.transAxes, va="center", fontsize=7, color=ink)


def _bars(axes: Any, figure: Bars) -> None:
    places = range(len(figure.bars))
    colours = [_LINES[int(bar.apart)] for bar in figure.bars]
    drawn = axes.barh(places, [bar.value for bar in figure.bars], height=0.7, color=colours)
    axes.bar_label(drawn, [f"{bar.value:.3g}" for bar in figure.bars], padding=3, fontsize=7)
    axes.set_yticks(places, [bar.label for bar in figure.bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(figure.x_label)
