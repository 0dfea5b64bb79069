"""What people look at: report.html, figures as files, the model card, two exports side by side."""

import os
from pathlib import Path

from .card import write_card
from .comparing import Comparison, compare_exports
from .comparison_page import write_comparison
from .exported import Exported, describe_foreign, read_export, read_validated
from .html import write_html
from .png import write_plots
from .sampling import read_study, sampled

__all__ = [
    "Comparison", "Exported", "compare", "describe_foreign", "read_export", "read_validated", "render", "write_card",
    "write_html",
]  # fmt: skip


def render(
    folder: str | os.PathLike[str],
    plots: str | os.PathLike[str] | None = None,
    study: str | os.PathLike[str] | None = None,
) -> Path:
    """Write report.html into a validated export, from what its files say; nothing runs. Returns its path.

    Args:
        plots: a folder for the same figures as PNG files, which takes matplotlib.
        study: the JSON of `qexport study`, for a section on texts under sampling settings. The folder does not keep it:
            a page that is written again without it has no such section.

    Raises:
        InputError: no export, never validated, a damaged report or study, a folder that cannot be written, or no
            matplotlib.
    """
    exported = read_validated(folder)
    section = None if study is None else sampled(read_study(study), exported.folder)
    if plots is not None:
        write_plots(exported, plots, section)
    return write_html(exported, section)


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], page: str | os.PathLike[str] | None = None
) -> Comparison:
    """Two validated exports side by side, from what their files say; nothing runs.

    Args:
        page: HTML file to write, for people; None writes none.

    Raises:
        InputError: no export, never validated, a damaged report, or a page that cannot be written.
    """
    both = read_validated(first), read_validated(second)
    found = compare_exports(*both)
    if page is not None:
        write_comparison(found, *both, Path(page))
    return found
