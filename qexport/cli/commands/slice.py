"""`qexport slice`: the upper bits of an export as a smaller one."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ..app import MAKE, command
from ..options import Folder, Json


@command(MAKE)
def slice(  # noqa: A001  the command's name
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    bits: Annotated[int, typer.Option(help="Bits to keep: 4 or 2.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write the upper bits of an export's 8-bit codes as an export of its own, without calibration."""
    from .. import console
    from ..printers.slice import print_sliced

    with console.showing_progress() as progress:
        done = qexport.slice_export(folder, bits=bits, out_dir=out, overwrite=overwrite, progress=progress)
    if as_json:
        console.print_json(done.as_dict())
    else:
        print_sliced(done)
