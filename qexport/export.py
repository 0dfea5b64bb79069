"""Export: capture, quantize block by block, lower, package."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .calibrate.float_model import fits_in_memory, loaded
from .calibrate.loop import Finished, quantize_blocks
from .calibrate.projection import hessian_of
from .calibrate.self_text import continue_text
from .calibrate.sources import Samples, load_samples
from .calibrate.stages import passes_for
from .calibrate.streams import Stream, last_readers, make_stream
from .capture.decoder import capture_decoder
from .capture.graph import Captured
from .capture.module import capture_module
from .capture.source import open_model
from .errors import InputError, LoweringError, QExportError, RecipeError
from .lower.attention import Grouping, Unsuited, group_attention, plan_grouping
from .lower.build import Lowered, Piece, Target, build, check_translations
from .lower.folder import appearing, check_free, explained, write_companions, write_model
from .lower.last_token import keep_last, read_by_projection
from .lower.merge import merge
from .lower.prefill import LONGEST_STEP
from .lower.sizes import by_part
from .lower.targets.cpu import CpuTarget
from .lower.targets.cuda import CudaTarget
from .passes.base import GraphPass
from .passes.edit import is_call
from .passes.embedding import EmbeddingPlan
from .passes.plan import LinearPlan
from .planning import described_embedding, output_projection, plan_for
from .recipe import Recipe
from .runtime.manifest import BlockEntry, LinearEntry, Manifest

Progress = Callable[[str, str, int, int], None]  # stage, what, done, total
ATTENTION = ("grouped", "standard")


def no_progress(stage: str, what: str, done: int, total: int) -> None:
    pass


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
    """

    folder: Path
    manifest: Manifest
    plan: list[LinearPlan]
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: str = ""
    embeddings: list[EmbeddingPlan] = field(default_factory=list)


def export(
    model: str | os.PathLike | torch.nn.Module,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    out_dir: str | os.PathLike,
    target: str = "cpu",
    calibration: Any = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
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
        model: a Hugging Face id, a folder, a GGUF file, or an nn.Module (with example_inputs).
        recipe: name of a preset, a scheme, a YAML file, or a Recipe.
        out_dir: the folder to make; it appears when everything is done.
        target: "cpu" (float32) or "cuda" (float16).
        calibration: a text file's path, "self", "random", "datasets:ID:SPLIT:COLUMN", a list of strings, or token ids
            [n, S]; for an nn.Module a list of input tuples. None takes what the recipe says. Where no pass needs it,
            quantized activations are still measured on it: blocks' SQNR and the quantization kernel.
        example_inputs: positional inputs of an nn.Module; their first dimension is the batch.
        overwrite: replace an earlier export.
        resume: go on with an interrupted export of the same model, recipe and calibration.
        logits: "all", or "last" for those of the last token of a sequence only: all that generation reads, and less
            work for a prompt; such a file cannot be validated.
        extra_passes: your own passes, run on every block in float before those of the recipe (see passes/README.md).
        attention: "grouped" (ONNX Runtime's GroupQueryAttention, a shared cache; a model that it cannot serve keeps the
            other, and the manifest says why) or "standard" (ONNX Attention).
        progress: called with (stage, what, done, total).

    Raises:
        QExportError: one of its kinds says what is wrong, where, and what to do.
    """
    out, seconds, clock = Path(out_dir), {}, _Clock()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    lowering = target_for(target, recipe)
    check_attention(attention)
    if logits not in ("all", "last"):
        raise InputError(f"unknown logits {logits!r}", remedy="Logits are all or last")
    check_free(out, overwrite)
    recipe, data = recipe_and_data(recipe, calibration)

    captured = capture(model, example_inputs, trust_remote_code=trust_remote_code)
    check_prefill(captured, recipe)
    check_translations(block.module.graph for block in captured.blocks)
    plan, embeddings = plan_for(captured, recipe, lowering.dtype.itemsize)
    projection = output_projection(captured)
    hidden = read_by_projection(captured) if logits == "last" else None
    seconds["capture"] = clock.lap()

    batches = None
    described = "none needed"
    wanted = needs_data(recipe, plan) or _ask_for_data(extra_passes, captured)
    if wanted or (calibration is not None and any(p.scheme and p.scheme.activation for p in plan)):
        batches, described = calibration_batches(captured, recipe, data, progress)
    seconds["calibration"] = clock.lap()

    work = out.parent / f".{out.name}.work"
    fingerprint = _fingerprint(captured, recipe, batches, extra_passes)
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    try:
        with explained(work):
            by_name, calibrated = {p.name: p for p in plan}, batches is not None
            hessian = None
            if recipe.weights.method == "gptq" and batches and any(e.linear for e in embeddings):
                hessian = hessian_of(captured, projection, batches(), recipe.weights, partial(progress, "embedding"))
            passes = passes_for(recipe, by_name, extra_passes, calibrated, embeddings, hessian)
            stream, reference = (batches(), batches()) if batches else (None, None)
            on_block = partial(progress, "quantize")
            finished = quantize_blocks(
                captured, passes, stream, reference, work, fingerprint, resume=resume, progress=on_block
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
        with appearing(out, overwrite) as folder:
            size = write_model(
                folder, lowered.model, lambda done, total: progress("write", "model.onnx.data", done, total)
            )
            named = (projection.name, projection.weight) if projection else ("", "")
            sizes = by_part(size, lowered.tensors, lowered.bytes, embeddings, named)
            manifest = _manifest(captured, plan, lowered, lowering, sizes, settings)
            seconds["lower"] = clock.lap()
            report = _report(plan, embeddings, finished, seconds, described)
            write_companions(folder, manifest, captured.folder, recipe.to_yaml(), report)
    except BaseException as error:
        # Neither a bad model nor a bad pass gets better by going on from where it stopped.
        hopeless = isinstance(error, QExportError) and not isinstance(error, InputError)
        if hopeless or not any(work.glob("*.safetensors")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)
    return ExportResult(out, manifest, plan, {k: round(v, 2) for k, v in seconds.items()}, described, embeddings)


def capture(model, example_inputs=None, *, trust_remote_code: bool = False) -> Captured:
    """Capture whatever a user passes as a model; see `export`."""
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise InputError(
                "an nn.Module needs example_inputs", remedy="Pass the inputs of one forward call as a tuple"
            )
        return capture_module(model, tuple(example_inputs))
    return capture_decoder(open_model(model, trust_remote_code=trust_remote_code))


def target_for(name: str, recipe: Recipe) -> Target:
    """The target a user names."""
    if name == "cpu":
        return CpuTarget(recipe.accuracy_level, recipe.prefill == "int8")
    if name == "cuda":
        if recipe.prefill is not None:
            raise RecipeError("prefill: int8 is a form for the CPU", place="prefill", remedy="Remove it for cuda")
        return CudaTarget()
    raise InputError(f"unknown target {name!r}", remedy="Targets are cpu and cuda")


def check_prefill(captured: Captured, recipe: Recipe) -> None:
    """Raises RecipeError where the recipe tells prompts from steps, and the model knows neither."""
    if recipe.prefill is not None and captured.kind != "decoder":
        raise RecipeError("prefill is for language models", place="prefill", remedy="Remove it for an nn.Module")


def needs_data(recipe: Recipe, plan: Sequence[LinearPlan]) -> bool:
    """Whether any pass will want calibration inputs."""
    return recipe.needs_calibration and (recipe.kv_cache is not None or any(p.scheme is not None for p in plan))


def _ask_for_data(passes: Sequence[GraphPass], captured: Captured) -> bool:
    """Whether a pass wants statistics, or promises to keep the function, which is checked on data."""
    return any(p.keeps_function or any(p.statistics(b.module) for b in captured.blocks) for p in passes)


def check_attention(attention: str) -> None:
    """Raises InputError for anything but "grouped" and "standard"."""
    if attention not in ATTENTION:
        raise InputError(f"unknown attention {attention!r}", remedy=f"Choose {' or '.join(ATTENTION)}")


def plan_attention(captured: Captured, attention: str, read: Callable[[str], torch.Tensor]) -> Grouping | str | None:
    """How the attention of a decoder can be grouped, or why not; None where that is not asked for.

    Args:
        attention: as `export` takes it.
        read: a tensor of the first block.
    """
    if attention == "standard" or captured.kind != "decoder":
        return None
    try:
        return plan_grouping(captured, read)
    except Unsuited as why:
        return str(why)


def deploy_attention(captured: Captured, grouping: Grouping | str | None) -> dict[str, Any]:
    """Rewrite a decoder's attention for the runtime, in place; returns what the manifest's settings say of it."""
    if not isinstance(grouping, Grouping):
        nodes = (node for block in captured.blocks for node in block.module.graph.nodes)
        if any(is_call(node, torch.ops.qexport.round_cache.default) for node in nodes):
            raise LoweringError(
                f"a cache of codes takes grouped attention, and it is standard here: {grouping or 'as asked for'}",
                place="kv_cache", remedy="Leave kv_cache out of the recipe",
            )  # fmt: skip
        return {"attention": "standard", **({"attention_reason": grouping} if grouping else {})}
    group_attention(captured, grouping)
    positions = any(port.name == "position_ids" for port in captured.inputs)
    settings = {"attention": "grouped", "past_present_share_buffer": True, "position_ids": positions, "padding": True}
    bits = max(site.bits for site in grouping.sites)
    return settings | ({"kv_cache_bits": bits} if bits else {})


def lower(captured: Captured, finished: Sequence[Finished], target: Target) -> Lowered:
    """Merge products and rewrite finished blocks for a target, in place, and translate them."""
    pieces = []
    for item in finished:
        block = item.block
        merged = merge(block.module)
        item.joined, item.apart = merged.joined, merged.apart
        item.prompt, prompt = target.prompt_twin(block.module), None
        if item.prompt is not None:
            target.rewrite(item.prompt, set(captured.constants))
            prompt = Piece(block.name, item.prompt, block.inputs, block.outputs, item.read_prompt)
        target.rewrite(block.module, set(captured.constants))
        pieces.append(Piece(block.name, block.module, block.inputs, block.outputs, item.read, prompt))
    return build(pieces, captured.inputs, captured.outputs, target, version("qexport"))


def recipe_and_data(recipe: Recipe, calibration: Any) -> tuple[Recipe, Any]:
    """The recipe with the calibration source a user names, or the recipe and the data a user passes."""
    if calibration is None:
        return recipe, None
    if isinstance(calibration, (str, os.PathLike)):
        spec = recipe.calibration.model_copy(update={"source": os.fspath(calibration)})
        return recipe.model_copy(update={"calibration": spec}), None
    return recipe, calibration


def calibration_batches(
    captured: Captured, recipe: Recipe, data, progress: Progress
) -> tuple[Callable[[], Stream], str]:
    """A factory of calibration streams, and what is in them."""
    if captured.kind == "module":
        return _module_batches(captured, data)
    spec = recipe.calibration
    tokenizer = captured.folder.tokenizer() if captured.folder else None
    vocab_size = captured.settings["vocab_size"]
    if data is None and spec.source == "self" and not fits_in_memory(captured):
        samples = load_samples(spec.model_copy(update={"source": "random"}), tokenizer=tokenizer, vocab_size=vocab_size)
        samples = Samples(
            samples.input_ids,
            samples.attention_mask,
            f"{samples.described}; the float model is too large to write text itself",
        )
    elif data is None and spec.source == "self":
        progress("calibrate", "the model writes its calibration text", 0, 1)
        with loaded(captured) as step:
            samples = load_samples(
                spec, tokenizer=tokenizer, vocab_size=vocab_size, generate=partial(continue_text, step)
            )
        progress("calibrate", "the model writes its calibration text", 1, 1)
    else:
        samples = load_samples(spec, data, tokenizer=tokenizer, vocab_size=vocab_size)
    return lambda: make_stream(captured, samples, spec.batch_size), samples.described


def _module_batches(captured: Captured, data) -> tuple[Callable[[], Stream], str]:
    if not data:
        raise InputError(
            "this recipe calibrates, and an nn.Module has no text", place="calibration",
            remedy="Pass calibration=[(input, ...), ...], one tuple for each batch",
        )  # fmt: skip
    keep = last_readers(captured)
    batches = [
        {port.value: t for port, t in zip(captured.inputs, inputs, strict=True) if port.value in keep}
        for inputs in data
    ]
    return lambda: Stream(batches, [None] * len(batches), keep), f"{len(batches)} batches given by the caller"


def _fingerprint(captured: Captured, recipe: Recipe, batches, extra_passes: Sequence[GraphPass]) -> str:
    digest = hashlib.sha256(f"{version('qexport')}\n{recipe.to_yaml()}\n{list(extra_passes)}".encode())
    if captured.folder is not None:
        for file in sorted(captured.folder.path.glob("*.safetensors")):
            state = file.stat()
            digest.update(f"{file}|{state.st_size}|{state.st_mtime_ns}".encode())
    if batches is not None:
        for batch in batches().batches:
            for name in sorted(batch):
                digest.update(batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _manifest(
    captured: Captured,
    plan: Sequence[LinearPlan],
    lowered: Lowered,
    target: Target,
    sizes: dict[str, int],
    settings: dict[str, Any],
) -> Manifest:
    linears = []
    for p in plan:
        if p.scheme is not None:
            found = lowered.linears[p.name]
            linears.append(LinearEntry(
                name=p.name, block=p.block, scheme=p.scheme.name, output=found.output, columns=found.columns,
                node=found.node, kernel=found.kernel, prompt_kernel=found.prompt_kernel,
                parts=lowered.parts.get(p.name, ()), shape=p.shape, bytes=lowered.bytes[p.name], reason=p.reason,
                fast=None if found.slow is None else not found.slow, slow=found.slow or "",
            ))  # fmt: skip
    return Manifest(
        qexport=version("qexport"), target=target.name, kind=captured.kind, provider=target.provider,
        dtype=str(target.dtype).removeprefix("torch."), session=lowered.session, numerics=target.numerics(),
        linears=tuple(linears), blocks=tuple(BlockEntry(name=n, output=o) for n, o in lowered.blocks.items()),
        settings=settings, bytes=sizes,
    )  # fmt: skip


def _report(plan, embeddings, finished: Sequence[Finished], seconds, calibration: str) -> dict[str, Any]:
    return {
        "export": {
            "calibration": calibration,
            "seconds": {k: round(v, 2) for k, v in seconds.items()},
            "float": [{"linear": p.name, "reason": p.reason} for p in plan if p.scheme is None],
            "apart": [{"linear": n, "reason": why} for item in finished for n, why in item.apart.items()],
            "embedding": [described_embedding(e) for e in embeddings],
            "blocks": [asdict(item.record) for item in finished],
        }
    }


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
