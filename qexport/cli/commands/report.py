"""`qexport report`: a validation again, or two side by side."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ...errors import InputError
from ..app import COMPARE, command
from ..options import Json, imported


@command(COMPARE)
def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder that `qexport validate` looked at.")] = None,
    other: Annotated[Path | None, typer.Argument(help="Another one, to compare with.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG; takes matplotlib.")] = None,
    study: Annotated[Path | None, typer.Option(help="JSON of `qexport study -o`, to show on the page too.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the key validation of report.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a validation again, or two side by side. Nothing runs; report.html is written again from report.json."""
    from .. import console

    if schema:
        from ...validation.report import report_schema

        console.print_json(report_schema())
        return
    if folder is None:
        raise InputError("no folder given", remedy="Give the folder that `qexport validate` looked at")
    from ..printers.report import print_comparison, print_rendered, rendered_summary

    imported()
    if other is not None:
        if study is not None:
            raise InputError("a study goes on the page of one folder", place="--study", remedy="Give one folder")
        found = qexport.compare(folder, other)
        if as_json:
            console.print_json(found.as_dict())
        else:
            print_comparison(found)
        return
    page = qexport.render(folder, plots, study)
    if as_json:
        console.print_json(rendered_summary(page))
    else:
        print_rendered(page)
