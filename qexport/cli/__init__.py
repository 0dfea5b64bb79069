"""The command line: arguments in, one call of the library, its result out."""

import gc
import sys
from typing import Annotated

import typer

import qexport

from ..errors import QExportError, needing_runtime
from ..log import configure, restore
from ..stopping import Stopped, raising_stopped
from .app import app, load_commands


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit code 2."""
    configure()
    load_commands()
    gc.disable()  # until everything is imported, see `options.imported`
    try:
        with needing_runtime(), raising_stopped():
            app()
    except QExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    finally:
        restore()
        # Leaving, Python looks through all that tracing left behind for cycles to free; the system frees it at once.
        gc.freeze()
        gc.enable()


def _version(wanted: bool) -> None:
    if wanted:
        print(qexport.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass
