"""`qexport layout`: the files of an export where another program looks for them."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ..app import RUN, command
from ..options import Folder, Json


@command(RUN)
def layout(
    folder: Folder, out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")], as_json: Json = False
) -> None:
    """Write an export as transformers.js reads it, in Node.js and in browsers."""
    from .. import console

    result = qexport.layout(folder, out)
    if as_json:
        console.print_json(result.as_dict())
    else:
        from ..printers.layout import print_layout

        print_layout(result)
