"""Logits of a file without a cache: a text in one run."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...capture.graph import CapturedModel
from ...errors import InputError
from ...runtime.session import open_session
from ..reference import decoder_feeds
from ..running import run_session
from .describing import Described


def whole_logits(
    described: Described, captured: CapturedModel, *, threads: int | None, provider: str | None
) -> Callable[[Tensor], Tensor]:
    """A function from token ids [S] to the file's logits, float32 [S, vocabulary].

    Raises:
        InputError: it gives logits of some tokens only.
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    session = open_session(described.folder, described.manifest, threads=threads, provider=provider)

    def run(ids: Tensor) -> Tensor:
        feeds = described.feeds(decoder_feeds(captured, ids[None]))[0]
        logits = run_session(session, feeds, ["logits"])["logits"].float().reshape(-1, captured.settings["vocab_size"])
        if len(logits) != len(ids):
            raise InputError(
                f"gives the logits of {len(logits)} tokens for {len(ids)}", place=described.facts.file,
                remedy="A comparison needs those of every token",
            )  # fmt: skip
        return torch.clone(logits)

    return run
