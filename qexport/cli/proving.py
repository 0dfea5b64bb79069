"""Commands that compare exports with their models, and show what was found."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import qexport

from ..errors import InputError
from .options import Folder, Json, Provider, Remote, Threads, app, imported


@app.command()
def validate(
    folder: Folder,
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on; by default text the model writes.")
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 8,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window; by default 512, and 128 for encoder-decoders.")
    ] = None,
    references: Annotated[
        bool,
        typer.Option("--references", help="Also measure float16 in PyTorch and the float model in ONNX Runtime."),
    ] = False,
    greedy: Annotated[
        int, typer.Option(min=0, help="New tokens that both models write greedily, to see where they part; 0: none.")
    ] = 32,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also what each linear costs in KL, and overrides that buy it back.")
    ] = False,
    threads: Threads = None,
    provider: Provider = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare an export with the float model: layers, logits, text. report.json and report.html keep it."""
    from . import console

    console.quiet_libraries()
    from .printers.summaries import print_validation

    imported()
    with console.showing_progress() as progress:
        report = qexport.validate(
            folder,
            reference,
            text=text,
            windows=windows,
            window=window,
            threads=threads,
            provider=provider,
            references=references,
            greedy=greedy,
            sensitivity=sensitivity,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        print_validation(report)
        for page in (folder / part / "report.html" for part in report.parts or [""]):
            print(f"\nThe page: {page}")


@app.command()
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
    from . import console

    if schema:
        from ..validation import Report

        console.print_json(Report.model_json_schema())
        return
    if folder is None:
        raise InputError("no folder given", remedy="Give the folder that `qexport validate` looked at")
    from .printers.validations import print_comparison, print_rendered, rendered_summary

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


@app.command()
def study(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `qexport export` wrote from one model.")],
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 takes the likeliest token; several times too; by default 0, 0.5, 0.8 and 1."),
    ] = None,
    top_k: Annotated[
        list[int] | None, typer.Option(help="Sample from the k likeliest tokens, 0 from all; by default 0 and 50.")
    ] = None,
    max_new_tokens: Annotated[
        list[int] | None, typer.Option(help="Length of texts; a shorter one is the start of the longest; 32 and 128.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of sampling, several times too; 0 and 1.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 file with a prompt a line; by default a few that come with qexport.")
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
    from . import console

    console.quiet_libraries()
    from ..sampling_study import check_place, check_plot, plot_study
    from .printers.summaries import print_study

    imported()
    given = {"temperatures": temperature, "top_ks": top_k, "max_new_tokens": max_new_tokens, "seeds": seed}
    grid = qexport.Grid(**{name: tuple(values) for name, values in given.items() if values})
    if out is not None:
        check_place(out)
    if plot is not None:
        check_plot(plot)
    with console.showing_progress() as progress:
        result = qexport.study(
            folders, reference, grid=grid, prompts=prompts, threads=threads, provider=provider,
            trust_remote_code=trust_remote_code, progress=progress,
            on_estimate=lambda estimate: print(estimate, file=sys.stderr, flush=True),
        )  # fmt: skip
    if out is not None:
        result.save(out)
    if plot is not None:
        plot_study(result, plot)
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_study(result)
