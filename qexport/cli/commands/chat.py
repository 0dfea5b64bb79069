"""`qexport chat`: a conversation."""

import signal
import sys
from typing import Annotated

import typer

import qexport

from ...stopping import Stopped
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


@command(RUN)
def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens in an answer.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = None,
    draft: Draft = None,
    draft_rows: DraftRows = None,
    threads: Threads = None,
    provider: Provider = None,
) -> None:
    """Talk with a model; it remembers what was said.

    Ctrl-C stops an answer, Ctrl-D ends; /forget begins anew, and /image FILE puts a picture in front of what is said
    next to a model of pictures and text.
    """
    from .. import console

    sampling, drafts = sampling_of(temperature, top_k, top_p, seed), drafts_of(draft, draft_rows)
    console.quiet_libraries()
    imported()
    talk = qexport.Chat(
        folder, system=system, max_new_tokens=max_new_tokens, sampling=sampling, threads=threads, provider=provider,
        drafts=drafts,
    )  # fmt: skip
    console.note("Ctrl-C stops an answer, Ctrl-D ends, /forget begins anew")
    images: list[str] = []
    while (text := _read()) is not None:
        if text == "/forget":
            talk.forget()
        elif text.startswith("/image "):
            images.append(text.removeprefix("/image ").strip())
        elif text:
            _answer(talk, text, images)
            images = []


def _read() -> str | None:
    """A line of the user's; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(talk: "qexport.Chat", text: str, images: list[str]) -> None:
    """The answer while it grows; Ctrl-C ends it and nothing else."""
    try:
        talk.say(text, lambda piece: print(piece, end="", flush=True), images)
    except Stopped as stop:
        if stop.number != signal.SIGINT:
            raise
    finally:
        print(flush=True)
