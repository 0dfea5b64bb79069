"""Other forms of the float model: what its difference from float32 in PyTorch is, no quantization can be blamed for."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

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
from ..targets.base import target_named
from .logits import compare_logits, deployed_logits
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
    found, left_out = [], []
    with half_logits(captured, windows, progress) as run:
        found.append(Reference(name=HALF, logits=compare_logits(reference, windows, run, progress)))
    name = f"{manifest.dtype} in ONNX Runtime"
    if not fits_in_memory(captured):
        left_out.append(f"{name} was left out: the float model takes more than half of the memory that is free")
        return found, left_out
    with float_file_logits(
        captured, manifest, folder, windows.shape[1], threads=threads, provider=provider, progress=progress
    ) as run:
        found.append(Reference(name=name, logits=compare_logits(reference, windows, run, progress)))
    return found, left_out


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
