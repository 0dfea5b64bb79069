"""How far the deployed model and the float one write the same text when both take the likeliest token."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..artifact.manifest import Manifest
from ..capture.graph import CapturedModel
from ..progress import StageProgress, no_stage_progress
from ..runtime.decoder import open_decoder
from .reference import FloatOutputs, decoder_feeds
from .report import Greedy

_PROMPTS, _PROMPT_TOKENS = 4, 64


def compare_greedy(
    captured: CapturedModel,
    manifest: Manifest,
    folder: Path,
    windows: Tensor,
    new_tokens: int,
    *,
    threads: int | None = None,
    provider: str | None = None,
    progress: StageProgress = no_stage_progress,
) -> Greedy:
    """Let the deployed file continue the beginnings of a few windows, and find where the float model would part.

    The deployed file decodes step by step with its cache. The float model reads each prompt with that continuation in
    one pass, a block in memory at a time. Up to the first place where its likeliest token is another one, the text is
    also what it would have written itself, so that this is where both part; an end-of-text token does not stop them.

    Args:
        windows: int64 [n, S]; the first 64 tokens of the first 4 are the prompts, fewer where S or the model's context
            leave less.
        new_tokens: 1 or more; fewer are taken where the model's context leaves no room for them behind a prompt.

    Raises:
        RuntimeProblem: ONNX Runtime refuses the model, does not have the provider, or fails.
    """
    longest = captured.settings.get("max_position_embeddings", new_tokens + _PROMPT_TOKENS)
    new_tokens = min(new_tokens, longest - 1)
    prompts = windows[:_PROMPTS, : min(_PROMPT_TOKENS, longest - new_tokens)]
    length = prompts.shape[1]
    decoder = open_decoder(folder, manifest, threads=threads, provider=provider, max_length=length + new_tokens)
    written = torch.tensor(decoder.generate(prompts.tolist(), max_new_tokens=new_tokens).tokens)
    del decoder
    # Nothing follows the last token, so the float model need not read it.
    reference = FloatOutputs(
        captured, decoder_feeds(captured, torch.cat([prompts, written[:, :-1]], 1)), ("logits",), progress
    )
    try:
        likeliest = [reference.outputs(row)["logits"][0, length - 1 :].argmax(-1) for row in range(len(prompts))]
    finally:
        reference.close()
    agreed = tuple(alike(want, got) for want, got in zip(likeliest, written, strict=True))
    return Greedy(prompts=len(prompts), prompt_tokens=length, new_tokens=new_tokens, agreed=agreed)


def alike(first: Tensor, second: Tensor) -> int:
    """How many tokens of two texts [n] are the same before the first that is not."""
    differs = np.flatnonzero((first != second).numpy())
    return int(differs[0]) if len(differs) else len(first)
