"""report.html: everything a validation found, in one file that asks nothing of the network."""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeGuard

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..artifact.scratch import write_whole
from ..validation.formatting import kernels, with_error
from ..validation.report import Report
from . import facts, svg, tables
from .drawing import figures_of
from .exported import Exported
from .figures import Bars, HeatMap, Lines
from .sampling import Sampled

HTML_FILE = "report.html"


def write_html(exported: Exported, sampled: Sampled | None = None) -> Path:
    """Write report.html into the folder of a validated export, by rename; returns its path.

    Args:
        sampled: a study that the page shows too.

    Raises:
        InputError: the folder cannot be written.
    """
    path = exported.folder / HTML_FILE
    write_whole(path, render_html(exported, sampled))
    return path


def render_html(exported: Exported, sampled: Sampled | None = None) -> str:
    """The page of a validated export."""
    report, manifest = exported.validation, exported.manifest
    drawn = figures_of(exported)
    charts = [f for f in drawn if not isinstance(f, HeatMap)]
    style, script = own_file("style.css"), own_file("report.js")
    export = exported.export
    return environment().get_template("report.html").render(
        model=exported.model, recipe_name=exported.recipe_name, report=report, manifest=manifest,
        style=Markup(style), script=Markup(script), style_hash=sha256(style), script_hash=sha256(script),
        keys=facts.key_figures(exported), yardsticks=facts.yardsticks(report),
        quality=facts.quality(report), scale=facts.scale(report), facts=_measured(report),
        maps=[(f, *svg.heat_map(f)) for f in drawn if isinstance(f, HeatMap)],
        charts=[_chart(f) for f in charts if not _of_ranges(f)],
        ranges=[(f, svg.lines(f, 290, 200), svg.styles(f)) for f in charts if _of_ranges(f)],
        tasks=exported.tasks, with_error=with_error, sampled=sampled,
        curves=[_chart(f) for f in sampled.figures] if sampled else [],
        values=tables.values(report), inputs=tables.inputs(report),
        overrides=facts.overrides_yaml(report), recipe=exported.recipe,
        kernels=kernels(report.placement), kept_float=_reasons(export, "float"), apart=_reasons(export, "apart"),
        dense=_reasons(export, "dense"),
        calibration=str(export.get("calibration") or ""), commands=facts.commands(exported),
        versions=facts.versions(exported), numerics=_words(manifest.numerics), session=manifest.session,
        settings=_words(report.settings),
    )  # fmt: skip


def _measured(report: Report) -> list[str]:
    """The sentences of a verdict that have no place of their own on the page."""
    placed = {*report.problems, *(gate.sentence for gate in report.gates)}
    placed |= {report.quality.sentence} if report.quality is not None else set()
    return [sentence for sentence in report.verdict if sentence not in placed]


def _of_ranges(figure: Lines | Bars) -> TypeGuard[Lines]:
    """Whether a figure is one of the small ones of ranges."""
    return figure.key.startswith("range_")


def _chart(figure: Lines | Bars) -> tuple[Lines | Bars, Markup, list[str]]:
    """The figure, its image, and the classes of the lines in its legend."""
    if isinstance(figure, Lines):
        return figure, svg.lines(figure), [] if figure.named else svg.styles(figure)
    return figure, svg.bars(figure), []


def _reasons(export, key: str) -> list[tuple[str, str]]:
    """(reason, its linears) of what an export lists by linear."""
    listed = export.get(key)
    grouped: dict[str, list[str]] = {}
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            grouped.setdefault(str(entry.get("reason") or ""), []).append(str(entry.get("linear")))
    return [(why, _some(names)) for why, names in grouped.items()]


def _some(names: list[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _words(settings: dict) -> dict[str, str]:
    return {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in settings.items() if v is not None}


@cache
def environment() -> Environment:
    """Templates of this package; everything that is put into them is escaped."""
    return Environment(
        loader=PackageLoader("qexport.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def own_file(name: str) -> str:
    """A file of the templates, to be put into a page."""
    return (files("qexport.report") / "templates" / name).read_text(encoding="utf-8")


def sha256(text: str) -> str:
    """For the page's content security policy: no script and no style but these two run, whatever a name contains."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
