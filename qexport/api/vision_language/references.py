"""Other forms of a float model of pictures and text beside float32 in PyTorch, all parts of each form in a chain."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, EMBEDDING, VISION
from ...artifact.scratch import scratch_folder
from ...calibrate.float_model import fits_in_memory
from ...capture.vision_language import FEATURES, VisionParts
from ...errors import writing_to
from ...progress import StageProgress
from ...runtime.decoder import Decoder
from ...runtime.session import open_session
from ...runtime.vision_language import PicturesAndText, reader_of
from ...validation.float_forms import export_float, float16_kernels, half_model, half_outputs
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import HALF, Reference
from .logits import About, Behind, deployed_by
from .sources import float_outputs

Feeds = Mapping[str, Tensor]


def compare_forms_of_pictures(
    parts: VisionParts, folder: Path, about: About, feeds: Mapping[str, Sequence[Feeds]], longest: int, *,
    threads: int | None, provider: str | None, progress: StageProgress,
) -> tuple[list[Reference], list[str]]:  # fmt: skip
    """Compare other forms of the float model with float32 in PyTorch, and say which were left out and why.

    Args:
        folder: of the export, whose target and dtype the float files get.
        feeds: what the float32 parts read of the examples, by part.
        longest: tokens of an example at most.

    Raises:
        InputError: PyTorch has no float16 kernel for an operator on the CPU, or the disk is full.
        RuntimeProblem: ONNX Runtime refuses a float file or does not have the provider.
    """
    name = f"{manifests.load(folder / DECODER).dtype} in ONNX Runtime"
    made = FloatOutputs(parts.decoder, feeds[DECODER], ("logits",), progress)
    reference, windows = Behind(made, about), about.windows
    try:
        with half_logits(parts, about, feeds, progress) as run:
            found = [Reference(name=HALF, logits=compare_logits(reference, windows, run, progress))]
        with float_files(parts, folder, longest, progress, threads=threads, provider=provider) as chain:
            if chain is None:
                return found, [f"{name} was left out: the float model takes more than half of the memory that is free"]
            logits = compare_logits(reference, windows, deployed_by(chain, about), progress)
            return [*found, Reference(name=name, logits=logits)], []
    finally:
        made.close()


@contextmanager
def half_logits(
    parts: VisionParts, about: About, feeds: Mapping[str, Sequence[Feeds]], progress: StageProgress
) -> Iterator[Callable[[Tensor], Tensor]]:
    """All parts in float16 in PyTorch on the CPU, a block of them in memory at a time.

    Yields:
        a function from token ids [S] to logits, float32 [S, vocabulary], to be called with the texts in their order.

    Raises:
        InputError: PyTorch has no float16 kernel for an operator on the CPU.
    """
    with float16_kernels():
        features = float_outputs(half_model(parts.vision), [_halved(given) for given in feeds[VISION]], progress)
        tokens = [
            {**given, FEATURES: made[FEATURES]} for given, made in zip(feeds[EMBEDDING], features, strict=True)
        ]
        merged = float_outputs(half_model(parts.embedding), tokens, progress)
    read = [{**_halved(given), **made} for given, made in zip(feeds[DECODER], merged, strict=True)]
    starts = iter(about.starts)
    with half_outputs(half_model(parts.decoder), read, progress) as run:

        def texts(ids: Tensor) -> Tensor:
            start = next(starts)
            return run(ids)[start : start + about.length]

        yield texts


@contextmanager
def float_files(
    parts: VisionParts, folder: Path, longest: int, progress: StageProgress, *, threads: int | None,
    provider: str | None,
) -> Iterator[tuple[PicturesAndText, Decoder] | None]:  # fmt: skip
    """The float model exported like an export, all parts of it; it takes its disk while this is open.

    Args:
        folder: of the export, whose target and dtype the float files get.
        longest: bounds a shared cache.

    Yields:
        None where the float model takes more than half of the memory that is free.

    Raises:
        InputError: the disk is full.
        RuntimeProblem: ONNX Runtime refuses a file or does not have the provider.
    """
    if not all(fits_in_memory(part) for part in parts.by_name.values()):
        yield None
        return
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with scratch_folder(beside) as place:
        made, sessions = {}, {}
        for part, captured in parts.by_name.items():
            (place / part).mkdir()
            with writing_to(place, "Free as much as the float model takes, or validate without references"):
                made[part] = export_float(captured, manifests.load(folder / part), place / part, progress)
            sessions[part] = open_session(place / part, made[part], threads=threads, provider=provider)
        reader = reader_of(folder, sessions[VISION], sessions[EMBEDDING])
        yield reader, Decoder(sessions[DECODER], made[DECODER].settings, max_length=longest, embed=reader)


def _halved(feeds: Feeds) -> dict[str, Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in feeds.items()}
