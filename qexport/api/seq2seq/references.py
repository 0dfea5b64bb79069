"""Other forms of a float encoder-decoder beside float32 in PyTorch, both parts of each form together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, ENCODER
from ...capture.seq2seq import Parts
from ...progress import StageProgress, no_stage_progress
from ...runtime.seq2seq import EncoderDecoder
from ...validation.float_forms import (
    compare_both_forms,
    float16_kernels,
    float_files,
    half_model,
    half_outputs,
    halved,
)
from ...validation.reference import FloatOutputs
from ...validation.report import Reference
from .exporting import by_name
from .logits import deployed_by

Feeds = Mapping[str, Tensor]


def compare_forms_of_parts(
    parts: Parts, folder: Path, sources: Sequence[Feeds], texts: Sequence[Feeds], *, threads: int | None,
    provider: str | None, progress: StageProgress = no_stage_progress,
) -> tuple[list[Reference], list[str]]:  # fmt: skip
    """Compare other forms of the float model with float32 in PyTorch, and say which were left out and why.

    Args:
        folder: of the export, whose target and dtype the float files get.
        sources: what the encoder reads; texts: what the float32 decoder reads about them, a batch each.

    Raises:
        InputError: PyTorch has no float16 kernel for an operator on the CPU, or the disk is full.
        RuntimeProblem: ONNX Runtime refuses a float file or does not have the provider.
    """
    reference = FloatOutputs(parts.decoder, texts, ("logits",), progress)
    try:
        return compare_both_forms(
            reference, torch.cat([text["input_ids"] for text in texts]), half_logits(parts, sources, texts, progress),
            _deployed(parts, folder, sources, progress, threads, provider), manifests.load(folder / DECODER).dtype,
            progress,
        )  # fmt: skip
    finally:
        reference.close()


@contextmanager
def half_logits(
    parts: Parts, sources: Sequence[Feeds], texts: Sequence[Feeds], progress: StageProgress = no_stage_progress
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Both parts in float16 in PyTorch on the CPU, a block of them in memory at a time.

    Args:
        sources: what the encoder reads; texts: what the float32 decoder reads about them, a batch each.

    Yields:
        a function from token ids [S] to logits, float32 [S, vocabulary], to be called with the texts in their order.

    Raises:
        InputError: PyTorch has no float16 kernel for an operator on the CPU.
    """
    encoder, decoder = half_model(parts.encoder), half_model(parts.decoder)
    with float16_kernels():
        made = FloatOutputs(encoder, [halved(source) for source in sources], _read(parts, texts), progress)
        try:
            feeds = [{**halved(text), **made.outputs(batch)} for batch, text in enumerate(texts)]
        finally:
            made.close()
    with half_outputs(decoder, feeds, progress) as run:
        yield run


@contextmanager
def _deployed(
    parts: Parts, folder: Path, sources: Sequence[Feeds], progress: StageProgress, threads: int | None,
    provider: str | None,
) -> Iterator[Callable[[Tensor], Tensor] | None]:  # fmt: skip
    """The same of both parts as float files, in ONNX Runtime; None where they take too much memory."""
    with float_files(by_name(parts), folder, progress, threads=threads, provider=provider) as files:
        if files is None:
            yield None
            return
        (encoder, _), (decoder, _) = files[ENCODER], files[DECODER]
        yield deployed_by(EncoderDecoder(folder, encoder, decoder), sources)


def _read(parts: Parts, texts: Sequence[Feeds]) -> list[str]:
    """What the decoder reads of what the encoder makes."""
    return [port.name for port in parts.encoder.outputs if port.name in texts[0]]
