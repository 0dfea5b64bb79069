"""`qexport doctor`: what is wrong with this machine, or with a folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qexport

from ..app import RUN, command
from ..options import Json


@command(RUN)
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Export whose files are compared with what was written, byte by byte.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what keeps models from running on this machine. Exit code 1 when something has to be mended."""
    from dataclasses import asdict

    from .. import console
    from ..printers.doctor import print_checks

    checks: list[Any] = qexport.diagnose(export=folder)
    if as_json:
        console.print_json([asdict(check) for check in checks])
    else:
        print_checks(checks)
    if not all(check.ok or check.optional for check in checks):
        raise typer.Exit(1)
