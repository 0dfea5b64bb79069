"""`qexport validate`: an export beside the float model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import qexport

from ...errors import InputError
from ...formatting import parsed_share
from ..app import COMPARE, command
from ..options import Adapters, Device, Json, Provider, Remote, Threads, imported
from ..recipes import adapters_of

GATES = "Limits for CI"


@command(COMPARE)
def validate(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder that `qexport export` wrote, or an ONNX file from another tool, or its folder.")
    ],
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on. By default the model writes its own.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows of the text to measure.")] = 8,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: 512; 128 for encoder-decoders.")
    ] = None,
    references: Annotated[
        bool,
        typer.Option("--references", help="Also measure float16 in PyTorch and the float model in ONNX Runtime."),
    ] = False,
    greedy: Annotated[
        int, typer.Option(min=0, help="New tokens that both models write greedily, to see where they diverge; 0: none.")
    ] = 32,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure what each linear costs in KL, and suggest overrides.")
    ] = False,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with 1 if the mean KL is larger.", rich_help_panel=GATES)
    ] = None,
    max_ppl_rise: Annotated[
        str | None,
        typer.Option(help="Exit with 1 if perplexity rises by more, such as 5%.", rich_help_panel=GATES),
    ] = None,
    min_top1: Annotated[
        str | None,
        typer.Option(
            help="Exit with 1 if the likeliest token is the same less often, such as 90%.", rich_help_panel=GATES
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report on a file from another tool. Default: beside it.")
    ] = None,
    adapter: Adapters = None,
    threads: Threads = None,
    provider: Provider = None,
    device: Device = "cpu",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare an export with the float model: layers, logits, text. report.json and report.html keep it.

    Exits with 1 where a limit is missed, and with 2 where something cannot be done.
    """
    from .. import console

    console.quiet_libraries()
    from ..printers.validate import print_validation

    imported()
    merged, kept = adapters_of(adapter or [])
    if len(kept) + (merged is not None) > 1:
        raise InputError("one adapter is validated at a time", place="--adapter")
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
            max_kl=max_kl,
            max_ppl_rise=None if max_ppl_rise is None else parsed_share(max_ppl_rise, "--max-ppl-rise"),
            min_top1=None if min_top1 is None else parsed_share(min_top1, "--min-top1"),
            trust_remote_code=trust_remote_code,
            progress=progress,
            device=device,
            out=out,
            adapter=merged or next(iter(kept.values()), None),
            active=next(iter(kept), None),
        )
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        print_validation(report)
        if kept and out is None:
            return
        place = out or (folder if folder.is_dir() else folder.parent)
        for page in (place / part / "report.html" for part in report.parts or [""]):
            print(f"\nThe page: {page}")
    if missed := [gate.sentence for gate in report.gates if not gate.passed]:
        print(*missed, sep="\n", file=sys.stderr)
        raise typer.Exit(1)
