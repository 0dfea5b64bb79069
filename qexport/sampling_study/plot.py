"""Curves over temperature as a PNG, with matplotlib where it is installed."""

import os
from pathlib import Path

from ..errors import InputError, writing_to
from .result import Study, StudyRow, check_place

_PANELS = {
    "distance": "total variation from float",
    "prefix_share": "share before the first difference",
    "perplexity": "perplexity under the float model",
    "repetition": "repeated 4-grams",
    "distinct_2": "distinct-2",
}


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be drawn or written.

    Raises:
        InputError: matplotlib is missing, or the place cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "a plot needs matplotlib", place=str(path), remedy='Install it: pip install "matplotlib>=3.10"'
        ) from None
    if path.suffix.lower() != ".png":
        raise InputError("a plot is a PNG file", place=str(path), remedy="Give a name that ends in .png")
    check_place(path)


def plot_study(study: Study, path: str | os.PathLike) -> Path:
    """Draw the longest texts of a study: a row of panels for each top_k, temperature to the right, a line a format.

    Raises:
        InputError: as `check_plot`.
    """
    path = Path(path)
    check_plot(path)
    from matplotlib.figure import Figure

    longest = max(study.max_new_tokens)
    rows = [row for row in study.rows if row.max_new_tokens == longest]
    top_ks = sorted({row.top_k for row in rows if row.temperature}) or [0]
    figure = Figure(figsize=(3.4 * len(_PANELS), 3 * len(top_ks) + 0.6), layout="constrained")
    panels = figure.subplots(len(top_ks), len(_PANELS), squeeze=False)
    for line, top_k in zip(panels, top_ks, strict=True):
        # The likeliest token is the same for every top_k.
        shown = [row for row in rows if row.top_k == top_k or not row.temperature]
        for panel, (measure, title) in zip(line, _PANELS.items(), strict=True):
            for format in study.formats:
                _line(panel, [row for row in shown if row.format == format.name], measure)
            panel.set_title(f"{title}\n{f'top-k {top_k}' if top_k else 'top-k off'}", fontsize=9)
            panel.set_xlabel("temperature", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{study.reference}, up to {longest} new tokens; bars are standard errors", fontsize=10)
    with writing_to(path, "Free some space, or choose another place"):
        figure.savefig(path, format="png", dpi=110)
    return path


def _line(panel, rows: list[StudyRow], measure: str) -> None:
    points = [row for row in sorted(rows, key=lambda r: r.temperature) if getattr(row, measure) is not None]
    panel.errorbar(
        [row.temperature for row in points], [getattr(row, measure) for row in points],
        yerr=[getattr(row, f"{measure}_error") or 0 for row in points],
        label=rows[0].format, marker="o", markersize=3, linewidth=1.2, elinewidth=0.8, capsize=2,
    )  # fmt: skip
