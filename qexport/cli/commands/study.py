"""`qexport study`: texts of exports and of the float model under many sampling settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qexport

from ..app import COMPARE, command
from ..options import Json, Provider, Remote, Threads, imported


@command(COMPARE)
def study(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `qexport export` wrote from one model.")],
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Temperature; 0: the likeliest token. May be repeated. Default: 0, 0.5, 0.8, 1."),
    ] = None,
    top_k: Annotated[
        list[int] | None, typer.Option(help="Sample from the k likeliest tokens; 0: from all. Default: 0 and 50.")
    ] = None,
    max_new_tokens: Annotated[
        list[int] | None,
        typer.Option(help="New tokens; shorter texts are the start of the longest. Default: 32 and 128.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of sampling; may be repeated. Default: 0 and 1.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 file with one prompt per line. Default: a few that come with qexport.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write everything to this file as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw curves over temperature into this PNG (matplotlib).")] = None,
    threads: Threads = None,
    provider: Provider = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Let exports and the float model write under many sampling settings, and compare their texts.

    distance: share of draws that differ at least, where both models read the float model's text (total variation).
    same start, same tokens: of the float model's text for the same random numbers, before the first difference and
    at all. perplexity: of the text under the float model; to float's: over that of the float model's own text.
    repeated: 4-grams that were there before. tokens/s: without prompts and drawing; the float model runs in PyTorch.
    """
    from .. import console

    console.quiet_libraries()
    from ...sampling_study import check_place, check_plot, plot_study
    from ..printers.study import print_study

    imported()
    given = {"temperatures": temperature, "top_ks": top_k, "max_new_tokens": max_new_tokens, "seeds": seed}
    varied: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values}
    grid = qexport.Grid(**varied)
    if out is not None:
        check_place(out)
    if plot is not None:
        check_plot(plot)
    with console.showing_progress() as progress:
        result = qexport.study(
            folders, reference, grid=grid, prompts=prompts, threads=threads, provider=provider,
            trust_remote_code=trust_remote_code, progress=progress,
            on_estimate=console.note,
        )  # fmt: skip
    if out is not None:
        result.save(out)
    if plot is not None:
        plot_study(result, plot)
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_study(result)
