"""Export: capture, quantize block by block, lower, package."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..artifact.manifest import Manifest
from ..artifact.names import public_name
from ..artifact.output import WorkFolder, claimed, explained
from ..calibrate.coverage import unseen_shares, warning
from ..calibrate.data import Progress, calibration_batches, check_calibration, needs_data, no_progress, recipe_and_data
from ..calibrate.fingerprint import fingerprint_of
from ..calibrate.loop import QuantizedBlock, quantize_blocks
from ..calibrate.model_passes import change_model
from ..calibrate.projection import seen_by_projection
from ..calibrate.recipe_passes import passes_for
from ..capture.dynamic import DynamicShapes
from ..capture.folder import capture_folder
from ..capture.graph import CapturedModel
from ..capture.module import Inputs, capture_module
from ..errors import InputError, QExportError
from ..graph.sites import Linear
from ..log import warn
from ..lower.attention_plan import check_attention, deploy_attention, plan_attention
from ..lower.blocks import lower
from ..lower.last_token import keep_last, read_by_projection
from ..lower.prefill_twin import LONGEST_STEP
from ..lower.saving import write_model
from ..lower.sizes import by_part
from ..models.agreement import ReaderAgreement
from ..models.provenance import origin
from ..models.source import ModelFolder, open_model, source_path
from ..passes.base import GraphPass
from ..passes.moe_coverage import CountChoices
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import output_projection
from ..recipe.recipe import Recipe
from ..report import read_export, write_card
from ..runtime.first_run import run_once
from ..targets.base import Target, target_for
from ..validation.reader import check_reader
from .describing import manifest_of, report_of
from .folder import write_companions
from .refusals import check_range, decide


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        folder: the output folder.
        manifest: what is in it.
        plan: the decision for every linear, in order.
        seconds: wall time by stage.
        calibration: what the statistics were taken on, or why there was nothing to take.
        embeddings: the decision for every table of token embeddings.
        convolutions: the decision for every convolution, in order.
        dense: mixtures of experts that compute every expert for every token, and why.
        rarely_chosen: linears of experts that few calibration tokens chose, and how many did.
        unseen: by name of the linear, the share of its input features that calibration never made active, if any.
        warnings: sentences about what may hurt, though it was done as asked.
        kept: files that the replaced folder held and no export wrote: they are in the new one, under these names.
        reference: how far the captured float graph is from a witness that reads the model itself.
    """

    folder: Path
    manifest: Manifest
    plan: list[LinearPlan]
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: str = ""
    embeddings: list[EmbeddingPlan] = field(default_factory=list)
    convolutions: list[ConvolutionPlan] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    rarely_chosen: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    kept: list[str] = field(default_factory=list)
    reference: ReaderAgreement = field(default_factory=ReaderAgreement)


def export(
    model: str | os.PathLike | ModelFolder | torch.nn.Module | CapturedModel,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    out_dir: str | os.PathLike,
    target: str = "cpu",
    dtype: str | None = None,
    calibration: Any = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    overwrite: bool = False,
    resume: bool = False,
    logits: str = "all",
    trust_remote_code: bool = False,
    extra_passes: Sequence[GraphPass] = (),
    attention: str = "grouped",
    progress: Progress = no_progress,
) -> ExportResult:
    """Quantize a model and write it as a folder that ONNX Runtime runs.

    Args:
        model: a Hugging Face id, a folder, a GGUF file, an nn.Module (with example_inputs), or a captured model.
        recipe: name of a preset, a scheme, a YAML file, or a Recipe.
        out_dir: the folder to make; it appears when everything is done.
        target: "cpu", "cuda", or the name of a target of your own (see `targets.base`).
        dtype: of what stays float, activations and cache: for cuda "float16" (None takes it) or "bfloat16", which has
            the range of float32 but 8 bits instead of 11, wants a GPU of compute capability 8.0, and has no kernels for
            quantized activations nor for weights without groups; for cpu "float32".
        calibration: a text file's path, "self", "random", "datasets:ID:SPLIT:COLUMN", a list of strings, or token ids
            [n, S]; for an nn.Module a list of inputs such as example_inputs. None takes what the recipe says. Where no
            pass needs it, quantized activations are still measured on it: blocks' SQNR and the quantization kernel.
        example_inputs: of an nn.Module: the tensors of one forward call, in order, or by the names of its parameters.
        dynamic_shapes: of an nn.Module: by input name, the dimensions that may change and their names, such as
            {"x": {0: "batch", 1: "length"}}, or as torch.export takes them; None: the first dimension of every input.
        overwrite: replace an earlier export.
        resume: go on with an interrupted export of the same model, recipe and calibration.
        logits: "all", or "last" for those of the last token of a sequence only: all that generation reads, and less
            work for a prompt; such a file cannot be validated.
        extra_passes: your own passes, run on every block in float before those of the recipe (see passes/README.md).
        attention: "grouped" (ONNX Runtime's GroupQueryAttention, a shared cache; a model that it cannot serve keeps the
            other, and the manifest says why) or "standard" (ONNX Attention).
        progress: called with (stage, what, done, total).

    Before calibration the captured float graph runs beside a witness that reads the model itself: transformers' model
    of the same folder, or the module; see `validation.reader.check_reader`.

    Raises:
        QExportError: one of its kinds says what is wrong, where, and what to do; CaptureError where the graph and its
            witness differ by more than rounding.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    lowering = target_for(target, recipe, dtype)
    check_attention(attention)
    if logits not in ("all", "last"):
        raise InputError(f"unknown logits {logits!r}", remedy="Logits are all or last")
    with claimed(Path(out_dir), overwrite, source_path(model)) as work:
        return _export(
            work, model, recipe, lowering, calibration=calibration, example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes, resume=resume, logits=logits, trust_remote_code=trust_remote_code,
            extra_passes=extra_passes, attention=attention, progress=progress,
        )  # fmt: skip


def _export(
    work: WorkFolder, model, recipe: Recipe, lowering: Target, *, calibration, example_inputs, dynamic_shapes,
    resume: bool, logits: str, trust_remote_code: bool, extra_passes: Sequence[GraphPass], attention: str,
    progress: Progress,
) -> ExportResult:  # fmt: skip
    seconds, clock = {}, _Clock()
    recipe, data = recipe_and_data(recipe, calibration)

    model = source_of(model, recipe, data, calibration is not None, trust_remote_code=trust_remote_code)
    captured = capture(model, example_inputs, dynamic_shapes, trust_remote_code=trust_remote_code)
    if captured is not model:
        for note in captured.notes:
            warn(note)
    changes = change_model(captured, recipe)
    decisions = decide(captured, recipe, lowering, attention)
    plan, embeddings, convolutions = decisions.plan, decisions.embeddings, decisions.convolutions
    check_range(captured, decisions, lowering.dtype)
    projection = output_projection(captured)
    hidden = read_by_projection(captured) if logits == "last" else None
    seconds["capture"] = clock.lap()
    progress("check", "reading of the model", 0, 1)
    checked = check_reader(captured)
    progress("check", "reading of the model", 1, 1)
    seconds["check"] = clock.lap()

    batches = None
    described = "none needed"
    wanted = needs_data(recipe, [*plan, *convolutions]) or _ask_for_data(extra_passes, captured)
    if wanted or (calibration is not None and any(p.scheme and p.scheme.activation for p in plan)):
        batches, described = calibration_batches(captured, recipe, data, progress)
    seconds["calibration"] = clock.lap()

    decided = [plan, embeddings, convolutions]
    fingerprint = fingerprint_of(captured, recipe, (lowering.name, lowering.dtype, decided), batches, extra_passes)
    try:
        with explained(work.blocks):
            by_name, calibrated = {p.name: p for p in plan}, batches is not None
            seen, wanted = None, recipe.weights.table_statistic() is not None
            if wanted and batches and any(e.linear for e in embeddings):
                on_table = partial(progress, "embedding")
                seen = seen_by_projection(captured, projection, batches(), recipe.weights, on_table)
            passes = passes_for(recipe, by_name, extra_passes, calibrated, embeddings, seen, convolutions)
            stream, reference = (batches(), batches()) if batches else (None, None)
            on_block = partial(progress, "quantize")
            finished = quantize_blocks(
                captured, passes, stream, reference, work.blocks, fingerprint, resume=resume, progress=on_block
            )
        seconds["quantize"] = clock.lap()
        if hidden is not None:
            keep_last(captured, hidden)
        settings = captured.settings | ({} if hidden is None else {"logits": "last"})
        if captured.kind == "decoder":
            settings |= deploy_attention(captured, plan_attention(captured, attention, finished[0].read))
        lowered = lower(captured, finished, lowering)
        if any(item.prompt is not None for item in finished):
            settings["prompts_from"] = LONGEST_STEP + 1
        with work.appearing() as folder:
            size = write_model(
                folder, lowered.model, lambda done, total: progress("write", "model.onnx.data", done, total)
            )
            named = (projection.name, projection.weight) if projection else ("", "")
            sizes = by_part(size, lowered.tensors, lowered.bytes, embeddings, named)
            manifest = manifest_of(captured, plan, convolutions, lowered, lowering, sizes, settings)
            ran = _first_run(lowering, folder, manifest, captured)
            seconds["lower"] = clock.lap()
            source = origin(captured.folder) if captured.folder else {"name": type(model).__name__}
            rarely, unseen = _rarely_chosen(finished), _unseen(finished, plan, projection, seen)
            told = warning({name: share for name, share in unseen.items() if name not in rarely})
            without = captured.folder.notes if captured.folder else ()
            warnings = (*without, *captured.notes, *((told,) if told else ()), *_unchecked(captured))
            planned = [*plan, *convolutions]
            report = report_of(
                source, planned, embeddings, passes, finished, seconds, described, ran, checked, changes, warnings,
                captured.left_out,
            )  # fmt: skip
            write_companions(folder, manifest, captured.folder, _published(recipe).to_yaml(), report)
            write_card(read_export(folder))
    except QExportError as error:
        if not isinstance(error, InputError):
            work.discard()  # neither a bad model nor a bad pass gets better by going on from where it stopped
        raise
    seconds = {k: round(v, 2) for k, v in seconds.items()}
    dense = {name: why for item in finished for name, why in item.dense.items()}
    return ExportResult(
        work.given, manifest, plan, seconds, described, embeddings, convolutions, dense, rarely, unseen, warnings,
        work.kept, checked,
    )  # fmt: skip


def _first_run(lowering: Target, folder: Path, manifest: Manifest, captured: CapturedModel) -> str:
    """What was run of a finished file, or why nothing was."""
    if why_not := lowering.why_not_run():
        return f"not run: {why_not}"
    return run_once(folder, manifest, {port.name: port.sizes for port in captured.inputs})


def _unchecked(captured: CapturedModel) -> list[str]:
    """A warning where the witness of a model could say nothing."""
    return [captured.reader.sentence()] if captured.witness is not None and captured.reader.why_not else []


def _rarely_chosen(finished: Sequence[QuantizedBlock]) -> dict[str, str]:
    return {name: what for item in finished for name, what in item.record.skipped.get(CountChoices.__name__, ())}


def _unseen(
    finished: Sequence[QuantizedBlock],
    plan: Sequence[LinearPlan],
    projection: Linear | None,
    seen: Any,
) -> dict[str, float]:
    """Shares of features that were never active, for the linears that have some."""
    counts = {name: count for item in finished for name, count in item.record.unseen.items()}
    if seen is not None and (count := int(seen.unseen().sum())):
        counts[projection.name] = count
    return unseen_shares(counts, plan)


def capture(
    model,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    trust_remote_code: bool = False,
) -> CapturedModel:
    """Capture whatever a user passes as a model; see `export`."""
    if isinstance(model, CapturedModel):
        return model
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise InputError("an nn.Module needs example_inputs", remedy="Pass the tensors of one forward call")
        return capture_module(model, example_inputs, dynamic_shapes)
    return capture_folder(opened(model, trust_remote_code=trust_remote_code))


def source_of(model, recipe: Recipe, data: Any, asked: bool, *, trust_remote_code: bool = False):
    """What a user passes, a model on disk opened, after a look for the texts that calibrate it.

    Args:
        data, asked: as `check_calibration` takes them.
    """
    if isinstance(model, torch.nn.Module | CapturedModel):
        return model
    folder = opened(model, trust_remote_code=trust_remote_code)
    check_calibration(folder, recipe, data, asked)
    return folder


def opened(model: str | os.PathLike | ModelFolder, *, trust_remote_code: bool = False) -> ModelFolder:
    """`open_model`, and a warning for whatever an export of it will go without."""
    if not isinstance(model, (str, os.PathLike, ModelFolder)):
        raise InputError(
            f"a {type(model).__name__} is no model", remedy="Pass a folder, a Hugging Face id or the nn.Module itself"
        )
    folder = open_model(model, trust_remote_code=trust_remote_code)
    if folder is not model:  # otherwise they were said when it was opened
        for note in folder.notes:
            warn(note)
    return folder


def _published(recipe: Recipe) -> Recipe:
    """The recipe as it travels with the export: a calibration text by its name, not by where it lay."""
    return recipe.with_calibration(source=public_name(recipe.calibration.source))


def _ask_for_data(passes: Sequence[GraphPass], captured: CapturedModel) -> bool:
    """Whether a pass wants statistics, or promises to keep the function, which is checked on data."""
    return any(p.preserves_output or any(p.statistics(b.module) for b in captured.blocks) for p in passes)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
