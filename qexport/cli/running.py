"""Commands that run exports, and what speeds that up or stands in its way."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qexport

from .options import Folder, Json, Provider, Threads, app, imported


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sample instead of taking the likeliest token; 0 does not.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that add up to p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the system says before the prompt.")] = None,
    threads: Threads = None,
    provider: Provider = None,
) -> None:
    """Continue a prompt with ONNX Runtime, printing while it grows."""
    from . import console

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = qexport.Sampling(**given) if given and temperature != 0 else None
    console.quiet_libraries()
    imported()
    written = False

    def show(row: int, piece: str) -> None:
        nonlocal written
        written = True
        print(piece, end="", flush=True)

    try:
        qexport.generate(
            folder, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, system=system, threads=threads,
            provider=provider, on_text=show,
        )  # fmt: skip
    finally:  # what stands there stays readable, whatever comes after it
        if written:
            print(flush=True)


@app.command()
def bench(
    folder: Folder,
    against: Annotated[Path | None, typer.Option(help="Another folder, measured in turns with the first.")] = None,
    prompt_length: Annotated[
        list[int] | None, typer.Option(help="Prompt tokens, several times too; by default 128, 512 and 2048.")
    ] = None,
    past: Annotated[
        list[int] | None, typer.Option(help="Tokens in the cache when decoding; by default 128 and 2048.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of everything; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime.")] = 2,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure speed, load time, memory and size, alone or against another folder."""
    from . import console
    from .printers.summaries import print_bench

    imported()
    with console.showing_progress() as progress:
        result = qexport.bench(
            folder, against, prompt_lengths=prompt_length or None, decode_pasts=past or None, repeats=repeats,
            threads=threads, provider=provider, progress=progress,
        )  # fmt: skip
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_bench(result)


@app.command()
def optimize(folder: Folder, as_json: Json = False) -> None:
    """Keep the graph that ONNX Runtime makes at every load in FOLDER/optimized: it loads faster, and takes disk."""
    from . import console

    result = qexport.optimize(folder)
    if as_json:
        console.print_json(result.as_dict())
    else:
        from .printers.summaries import print_optimized

        print_optimized(result)


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Export whose files are compared with what was written, byte by byte.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what keeps models from running on this machine. Exit code 1 when something has to be mended."""
    from dataclasses import asdict

    from . import console
    from .printers.summaries import print_checks

    checks: list[Any] = qexport.diagnose(export=folder)
    if as_json:
        console.print_json([asdict(check) for check in checks])
    else:
        print_checks(checks)
    if not all(check.ok or check.optional for check in checks):
        raise typer.Exit(1)
