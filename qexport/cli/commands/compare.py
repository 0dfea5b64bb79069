"""`qexport compare`: two validated exports side by side."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ..app import COMPARE, command
from ..options import Json, imported

Page = Annotated[
    Path | None, typer.Option("--html", help="Page to write. Default: comparison.html in the second folder.")
]


@command(COMPARE)
def compare(
    first: Annotated[Path, typer.Argument(help="Folder that `qexport validate` has checked.")],
    second: Annotated[Path, typer.Argument(help="A second one to compare it with.")],
    html: Page = None,
    as_json: Json = False,
) -> None:
    """Show two validations side by side, with a page for whoever has to choose. Nothing runs."""
    show_comparison(first, second, html, as_json=as_json)


def show_comparison(first: Path, second: Path, html: Path | None, *, as_json: bool) -> None:
    """What `qexport compare` does, and `qexport report` with two folders."""
    from ...report.comparison_page import COMPARISON_FILE
    from .. import console
    from ..printers.report import print_comparison

    imported()
    page = html or second / COMPARISON_FILE
    found = qexport.compare(first, second, page)
    if as_json:
        console.print_json(found.as_dict() | {"html": str(page)})
    else:
        print_comparison(found)
        print(f"\nThe page: {page}")
