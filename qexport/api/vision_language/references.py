"""Other forms of a float model of pictures and text beside float32 in PyTorch, all parts of each form in a chain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, EMBEDDING, VISION
from ...capture.vision_language import FEATURES, VisionParts
from ...progress import StageProgress
from ...runtime.decoder import Decoder
from ...runtime.vision_language import reader_of
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
    made = FloatOutputs(parts.decoder, feeds[DECODER], ("logits",), progress)
    try:
        return compare_both_forms(
            Behind(made, about), about.windows, half_logits(parts, about, feeds, progress),
            _deployed(parts, folder, about, longest, progress, threads, provider),
            manifests.load(folder / DECODER).dtype, progress,
        )  # fmt: skip
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
        features = float_outputs(half_model(parts.vision), [halved(given) for given in feeds[VISION]], progress)
        tokens = [
            {**given, FEATURES: made[FEATURES]} for given, made in zip(feeds[EMBEDDING], features, strict=True)
        ]
        merged = float_outputs(half_model(parts.embedding), tokens, progress)
    read = [{**halved(given), **made} for given, made in zip(feeds[DECODER], merged, strict=True)]
    starts = iter(about.starts)
    with half_outputs(half_model(parts.decoder), read, progress) as run:

        def texts(ids: Tensor) -> Tensor:
            start = next(starts)
            return run(ids)[start : start + about.length]

        yield texts


@contextmanager
def _deployed(
    parts: VisionParts, folder: Path, about: About, longest: int, progress: StageProgress, threads: int | None,
    provider: str | None,
) -> Iterator[Callable[[Tensor], Tensor] | None]:  # fmt: skip
    """The same of all parts as float files, in ONNX Runtime; None where they take too much memory.

    Args:
        longest: bounds a shared cache.
    """
    with float_files(parts.by_name, folder, progress, threads=threads, provider=provider) as files:
        if files is None:
            yield None
            return
        reader = reader_of(folder, files[VISION][0], files[EMBEDDING][0])
        session, made = files[DECODER]
        yield deployed_by((reader, Decoder(session, made.settings, max_length=longest, embed=reader)), about)
