"""Other forms of the float model: what its difference from float32 in PyTorch is, no quantization can be blamed for."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from ..artifact import manifest as manifests
from ..artifact.manifest import Manifest
from ..artifact.scratch import scratch_folder
from ..calibrate.float_model import fits_in_memory
from ..calibrate.loop import quantize_blocks
from ..capture.graph import CapturedModel, Port, WeightSource
from ..errors import InputError, writing_to
from ..lower.attention_plan import deploy_attention, plan_attention
from ..lower.blocks import lower_blocks
from ..lower.precision import to_half
from ..lower.saving import write_model
from ..progress import StageProgress, no_stage_progress
from ..runtime.session import open_session
from ..targets.base import target_named
from .logits import Outputs, compare_logits, deployed_logits
from .reference import Feeds, FloatOutputs, decoder_feeds
from .report import HALF, Reference

_STEPS = 8


def compare_forms(
    captured: CapturedModel,
    manifest: Manifest,
    folder: Path,
    reference: FloatOutputs,
    windows: Tensor,
    *,
    threads: int | None = None,
    provider: str | None = None,
    progress: StageProgress = no_stage_progress,
) -> tuple[list[Reference], list[str]]:
    """Compare other forms of the float model with float32 in PyTorch, and say which were left out and why.

    Args:
        manifest, folder: of the export, whose target, attention and dtype the float file gets.
        reference: the model in float32 on these windows; windows: int64 [n, S].

    Raises:
        InputError: PyTorch has no float16 kernel for an operator on the CPU, or the disk is full.
        RuntimeProblem: ONNX Runtime refuses the float file or does not have the provider.
    """

    @contextmanager
    def deployed() -> Iterator[Callable[[Tensor], Tensor] | None]:
        if not fits_in_memory(captured):
            yield None
            return
        with float_file_logits(
            captured, manifest, folder, windows.shape[1], threads=threads, provider=provider, progress=progress
        ) as run:
            yield run

    half = half_logits(captured, windows, progress)
    return compare_both_forms(reference, windows, half, deployed(), manifest.dtype, progress)


def compare_both_forms(
    reference: Outputs, windows: Tensor, half: AbstractContextManager[Callable[[Tensor], Tensor]],
    deployed: AbstractContextManager[Callable[[Tensor], Tensor] | None], dtype: str, progress: StageProgress,
) -> tuple[list[Reference], list[str]]:  # fmt: skip
    """Compare a float model in float16 in PyTorch, and in ONNX Runtime, with float32 in PyTorch.

    Args:
        reference, windows: as `compare_logits` takes them.
        half: opens what computes logits in float16.
        deployed: opens what computes them in ONNX Runtime; None where the model takes too much memory for that.
        dtype: of the file.

    Returns:
        what was compared, and in words what was left out and why.
    """
    with half as run:
        found = [Reference(name=HALF, logits=compare_logits(reference, windows, run, progress))]
    name = f"{dtype} in ONNX Runtime"
    with deployed as run_file:
        if run_file is None:
            return found, [f"{name} was left out: the float model takes more than half of the memory that is free"]
        return [*found, Reference(name=name, logits=compare_logits(reference, windows, run_file, progress))], []


@contextmanager
def half_logits(
    captured: CapturedModel, windows: Tensor, progress: StageProgress = no_stage_progress
) -> Iterator[Callable]:
    """The model in float16 in PyTorch on the CPU, block by block: weights and activations.

    Tables that depend on positions alone stay float32 until they meet activations, as in a float16 model of
    transformers.

    Args:
        windows: int64 [n, S].

    Yields:
        a function from token ids [S] to logits, float32 [S, vocabulary], to be called with the windows in their order.

    Raises:
        InputError: PyTorch has no float16 kernel for one of the model's operators on the CPU.
    """
    half = half_model(captured)
    with half_outputs(half, decoder_feeds(half, windows), progress) as run:
        yield run


@contextmanager
def half_outputs(
    half: CapturedModel, feeds: Sequence[Feeds], progress: StageProgress
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Logits of a decoder in float16 for feeds of one text each.

    Yields:
        a function from token ids, which it does not read, to logits, float32 [S, vocabulary]: those of one text after
            another.

    Raises:
        InputError: as `half_logits`.
    """
    with float16_kernels():
        outputs = FloatOutputs(half, feeds, ("logits",), progress)
    numbers = iter(range(len(feeds)))

    def run(_: Tensor) -> Tensor:
        with float16_kernels():
            return outputs.outputs(next(numbers))["logits"][0].float()

    try:
        yield run
    finally:
        outputs.close()


@contextmanager
def float16_kernels() -> Iterator[None]:
    """Say in a sentence what PyTorch cannot run in float16.

    Raises:
        InputError: an operator has no such kernel on the CPU.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "not implemented for 'Half'" not in str(error):
            raise
        raise InputError(
            f"PyTorch cannot run it in float16 on the CPU: {str(error).splitlines()[0]}", place=HALF,
            remedy="Validate without references",
        ) from error  # fmt: skip


def halved(feeds: Feeds) -> dict[str, Tensor]:
    """What a model in float16 reads for feeds in float32."""
    return {name: value.half() if value.is_floating_point() else value for name, value in feeds.items()}


def half_model(captured: CapturedModel) -> CapturedModel:
    """A copy of a float32 model, weights not loaded, that computes in float16."""
    twin = captured.copy()
    for block in twin.blocks:
        to_half(block.module, set(captured.constants), torch.float16)
    return dataclasses.replace(
        twin, weights=_HalfWeights(captured.weights),
        inputs=[_half_port(port) for port in captured.inputs], outputs=[_half_port(port) for port in captured.outputs],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _HalfWeights:
    weights: WeightSource

    def load(self, name: str) -> Tensor:
        tensor = self.weights.load(name)
        return tensor.half() if tensor.is_floating_point() else tensor


def _half_port(port: Port) -> Port:
    return dataclasses.replace(port, dtype=torch.float16) if port.dtype.is_floating_point else port


@contextmanager
def float_file_logits(
    captured: CapturedModel,
    manifest: Manifest,
    beside: Path,
    length: int,
    *,
    threads: int | None = None,
    provider: str | None = None,
    progress: StageProgress = no_stage_progress,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """The float model exported for the target of `manifest`, with its attention, and run in ONNX Runtime.

    The last 8 tokens of a text come one at a time, so that decoding with the cache is measured with the rest. The file
    takes the disk of the float model while this is open.

    Args:
        beside: the export; the temporary folder lies next to it, or in the system's where that is not allowed.
        length: as `deployed_logits` takes it.

    Yields:
        see `deployed_logits`.

    Raises:
        InputError: the disk is full.
        RuntimeProblem: ONNX Runtime refuses the file or does not have the provider.
    """
    place = beside.parent if os.access(beside.parent, os.W_OK) else None
    with scratch_folder(place) as folder:
        with writing_to(folder, "Free as much as the float model takes, or validate without references"):
            made = export_float(captured, manifest, folder, progress)
        yield deployed_logits(folder, made, length, steps=_STEPS, threads=threads, provider=provider)


@contextmanager
def float_files(
    parts: Mapping[str, CapturedModel], folder: Path, progress: StageProgress, *, threads: int | None,
    provider: str | None,
) -> Iterator[dict[str, tuple[ort.InferenceSession, Manifest]] | None]:  # fmt: skip
    """The float model of an export in several parts, exported like it; it takes its disk while this is open.

    Args:
        parts: by the names of their folders.
        folder: of the export, whose target and dtype the float files get.

    Yields:
        by part a session and what it runs; None where the float model takes more than half of the memory that is free.

    Raises:
        InputError: the disk is full.
        RuntimeProblem: ONNX Runtime refuses a file or does not have the provider.
    """
    if not all(fits_in_memory(part) for part in parts.values()):
        yield None
        return
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with scratch_folder(beside) as place:
        opened = {}
        for part, captured in parts.items():
            (place / part).mkdir()
            with writing_to(place, "Free as much as the float model takes, or validate without references"):
                made = export_float(captured, manifests.load(folder / part), place / part, progress)
            opened[part] = open_session(place / part, made, threads=threads, provider=provider), made
        yield opened


def export_float(captured: CapturedModel, like: Manifest, folder: Path, progress: StageProgress) -> Manifest:
    """Write model.onnx of a decoder, nothing quantized, into `folder`, in the form of an export with that manifest.

    Returns:
        what `open_session` needs to run it.
    """
    twin = captured.copy()
    target = target_named(like.target).exact(getattr(torch, like.dtype))
    finished = quantize_blocks(twin, [], None, None, folder / "blocks", "float")
    attention = like.settings.get("attention", "standard")
    settings = twin.settings | deploy_attention(twin, plan_attention(twin, attention, finished[0].read))
    lowered = lower_blocks(twin, finished, target)
    write_model(folder, lowered.model, lambda done, total: progress("write", done, total))
    return Manifest(
        qexport=version("qexport"), target=target.name, kind=twin.kind, provider=target.provider, dtype=like.dtype,
        session=lowered.session, settings=settings,
    )  # fmt: skip
