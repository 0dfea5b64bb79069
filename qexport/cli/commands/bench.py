"""`qexport bench`: speed, memory, size."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ..app import RUN, command
from ..options import Folder, Json, Provider, Threads, imported


@command(RUN)
def bench(
    folder: Folder,
    against: Annotated[Path | None, typer.Option(help="Another folder, measured in turns with the first.")] = None,
    prompt_length: Annotated[
        list[int] | None, typer.Option(help="Tokens in a prompt; may be repeated. Default: 128, 512 and 2048.")
    ] = None,
    past: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in the cache when decoding; may be repeated. Default: 128 and 2048.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to measure besides 1; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="How often everything is measured; the median is reported.")] = 5,
    threads: Threads = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure speed, load time, memory and size, alone or against another folder."""
    from ...report.speed import keep_speed
    from .. import console
    from ..printers.bench import print_bench

    imported()
    with console.showing_progress() as progress:
        result = qexport.bench(
            folder, against, prompt_lengths=prompt_length or None, decode_pasts=past or None, batches=batch or (),
            repeats=repeats, threads=threads, provider=provider, progress=progress,
        )  # fmt: skip
    keep_speed(result)
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_bench(result)
