"""Other forms of a float encoder-decoder beside float32 in PyTorch, both parts of each form together."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, ENCODER
from ...artifact.scratch import scratch_folder
from ...calibrate.float_model import fits_in_memory
from ...capture.seq2seq import Parts
from ...errors import writing_to
from ...progress import StageProgress, no_stage_progress
from ...runtime.seq2seq import EncoderDecoder
from ...runtime.session import open_session
from ...validation.float_forms import export_float, float16_kernels, half_model, half_outputs
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import HALF, Reference
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
    ids, name = torch.cat([text["input_ids"] for text in texts]), manifests.load(folder / DECODER).dtype
    name = f"{name} in ONNX Runtime"
    reference = FloatOutputs(parts.decoder, texts, ("logits",), progress)
    try:
        with half_logits(parts, sources, texts, progress) as run:
            found = [Reference(name=HALF, logits=compare_logits(reference, ids, run, progress))]
        with float_files(parts, folder, progress, threads=threads, provider=provider) as pair:
            if pair is None:
                return found, [f"{name} was left out: the float model takes more than half of the memory that is free"]
            logits = compare_logits(reference, ids, deployed_by(pair, sources), progress)
            return [*found, Reference(name=name, logits=logits)], []
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
        made = FloatOutputs(encoder, [_halved(source) for source in sources], _read(parts, texts), progress)
        try:
            feeds = [{**_halved(text), **made.outputs(batch)} for batch, text in enumerate(texts)]
        finally:
            made.close()
    with half_outputs(decoder, feeds, progress) as run:
        yield run


@contextmanager
def float_files(
    parts: Parts, folder: Path, progress: StageProgress, *, threads: int | None, provider: str | None
) -> Iterator[EncoderDecoder | None]:
    """The float model exported like an export, both parts of it; it takes its disk while this is open.

    Args:
        folder: of the export, whose target and dtype the float files get.

    Yields:
        None where the float model takes more than half of the memory that is free.

    Raises:
        InputError: the disk is full.
        RuntimeProblem: ONNX Runtime refuses a file or does not have the provider.
    """
    if not all(fits_in_memory(part) for part in (parts.encoder, parts.decoder)):
        yield None
        return
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with scratch_folder(beside) as place:
        sessions = {}
        for part, captured in by_name(parts).items():
            (place / part).mkdir()
            with writing_to(place, "Free as much as the float model takes, or validate without references"):
                made = export_float(captured, manifests.load(folder / part), place / part, progress)
            sessions[part] = open_session(place / part, made, threads=threads, provider=provider)
        yield EncoderDecoder(folder, sessions[ENCODER], sessions[DECODER])


def _read(parts: Parts, texts: Sequence[Feeds]) -> list[str]:
    """What the decoder reads of what the encoder makes."""
    return [port.name for port in parts.encoder.outputs if port.name in texts[0]]


def _halved(feeds: Feeds) -> Feeds:
    return {name: value.half() if value.is_floating_point() else value for name, value in feeds.items()}
