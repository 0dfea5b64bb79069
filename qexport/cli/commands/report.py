"""`qexport report`: a validation again, or two side by side."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ...errors import InputError
from ..app import COMPARE, command
from ..options import Json, imported
from .compare import Page, show_comparison


@command(COMPARE)
def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder that `qexport validate` has checked.")] = None,
    other: Annotated[Path | None, typer.Argument(help="A second one to compare it with.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG; needs matplotlib.")] = None,
    study: Annotated[Path | None, typer.Option(help="JSON of `qexport study -o`, to show on the page as well.")] = None,
    html: Page = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the key validation of report.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a validation again, or two side by side, as `compare` does. Nothing runs; pages are written again."""
    from .. import console

    if schema:
        from ...validation.report import report_schema

        console.print_json(report_schema())
        return
    if folder is None:
        raise InputError("no folder given", remedy="Give a folder that `qexport validate` has checked")
    from ..printers.report import print_rendered, rendered_summary

    imported()
    if html is not None and other is None:
        raise InputError(
            "the page of one folder is written into that folder", place="--html", remedy="Give two folders"
        )
    if other is not None:
        if study is not None:
            raise InputError(
                "a study can only be shown on the page of one folder", place="--study", remedy="Give one folder"
            )
        show_comparison(folder, other, html, as_json=as_json)
        return
    page = qexport.render(folder, plots, study)
    if as_json:
        console.print_json(rendered_summary(page))
    else:
        print_rendered(page)
