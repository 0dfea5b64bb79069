"""`qexport generate`: a prompt continued."""

from pathlib import Path
from typing import Annotated

import typer

import qexport

from ...artifact.arrays import read_arrays
from ..app import RUN, command
from ..options import (
    Draft,
    DraftRows,
    Folder,
    Provider,
    SamplingSeed,
    Temperature,
    Threads,
    TopK,
    TopP,
    drafts_of,
    imported,
    sampling_of,
)

PAIR = "Encoder-decoders"


@command(RUN)
def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue, or to write about.")] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Safetensors file of sound or pictures, for an encoder-decoder of them.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: system message before the prompt.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Name of an adapter that the export keeps apart.")] = None,
    beams: Annotated[
        int | None,
        typer.Option(help="Number of beams. Default: what the model's config says.", rich_help_panel=PAIR),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(help="Language of the speech, such as en. By default the model detects it.", rich_help_panel=PAIR)
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What to do with speech: transcribe or translate.", rich_help_panel=PAIR)
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Also write timestamps.", rich_help_panel=PAIR)
    ] = False,
    draft: Draft = None,
    draft_rows: DraftRows = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture to write about; may be repeated.")
    ] = None,
    threads: Threads = None,
    provider: Provider = None,
) -> None:
    """Continue a prompt with ONNX Runtime, printing while it grows."""
    from .. import console

    speech = qexport.Speech(language, task, timestamps) if language or task or timestamps else None
    sampling, drafts = sampling_of(temperature, top_k, top_p, seed), drafts_of(draft, draft_rows)
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
            provider=provider, on_text=show, adapter=adapter, drafts=drafts, images=image or (), beams=beams,
            speech=speech, inputs=None if inputs is None else read_arrays(inputs),
        )  # fmt: skip
    finally:  # what stands there stays readable, whatever comes after it
        if written:
            print(flush=True)
