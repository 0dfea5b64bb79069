"""Comparing an export with the float model it was made from."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..artifact import checksums
from ..artifact import manifest as manifests
from ..artifact.manifest import RECIPE_FILE, Manifest
from ..artifact.names import public_name
from ..artifact.output import inside
from ..calibrate.block_activations import module_feeds
from ..calibrate.encoder_inputs import encoder_batch, with_last_token
from ..calibrate.model_passes import change_model
from ..capture.folder import capture_folder
from ..capture.graph import CapturedModel
from ..capture.module import Inputs, axes_of, capture_module
from ..errors import InputError
from ..mixed_precision.sensitivity import costs_of, restore
from ..models.source import open_model
from ..recipe.recipe import Recipe
from ..report import read_validated, write_card, write_html
from ..runtime.provider import chosen_provider, provider_named
from ..runtime.session import open_session
from ..validation.account import transforms
from ..validation.environment import settings, versions
from ..validation.float_forms import compare_forms
from ..validation.greedy import compare_greedy
from ..validation.layers import compare, compare_layers
from ..validation.logits import check_all_logits, compare_logits, deployed_logits
from ..validation.placement import examine
from ..validation.reader import check_reader
from ..validation.reference import Feeds, FloatOutputs, check_same_model, decoder_feeds
from ..validation.report import Report, ValueComparison
from ..validation.report_store import exported_activations, exported_warnings, save
from ..validation.running import run_session
from ..validation.text import Text, choose_text
from ..validation.timing import measure, with_times
from ..validation.verdict import with_verdict

# Tokens on which values inside the model are compared: enough rows for every statistic, few enough to hold a block's.
_LAYER_TOKENS = 256
_COSTED_WINDOWS = 4  # whose first tokens these are, where costs in KL are measured


def _silent(stage: str, what: str, done: int, total: int) -> None:
    pass


def validate(
    folder: str | os.PathLike,
    reference: str | os.PathLike | torch.nn.Module | CapturedModel,
    *,
    text: str | os.PathLike | None = None,
    windows: int = 8,
    window: int = 512,
    inputs: Sequence[Inputs] | None = None,
    threads: int | None = None,
    provider: str | None = None,
    references: bool = False,
    greedy: int = 32,
    sensitivity: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str, str, int, int], None] = _silent,
) -> Report:
    """Compare an export with the float model it was made from, and write the result into its report.json.

    report.html shows it, and the model card gets its numbers.

    The float model itself is compared first with a witness that reads it too: transformers' model of the same folder,
    or the module. The deployed file runs in ONNX Runtime with the session options of its manifest; the float model runs
    in PyTorch in float32, one block in memory at a time.

    Args:
        folder: what `export` wrote; it has to be writable.
        reference: the model that was exported: a Hugging Face id, a folder, a GGUF file, an nn.Module, or the captured
            model (whose weights stay unloaded).
        text: a UTF-8 file or a string. None: the float model writes the text, and the report says so.
        windows, window: how many stretches of text and tokens in each; each stands alone.
        inputs: for models without text: the tensors of one forward call each, in order or by name.
        threads: threads within an ONNX Runtime operator.
        provider: execution provider: cpu, cuda, or ONNX Runtime's name; None takes the one the file was made for.
        references: also measure how far other forms of the float model are from float32 in PyTorch on the same windows:
            float16 in PyTorch, and the float model in ONNX Runtime, exported like this export (for a while this takes
            the disk of the float model). It takes a float16 kernel of PyTorch for every operator.
        greedy: new tokens that both models write greedily after the first 64 tokens of the first 4 windows, to see
            where they part; 0 for none.
        sensitivity: also measure what each linear costs in KL, restore the costliest to float in turn, and suggest
            overrides for the recipe. It runs the float model forward and back.
        trust_remote_code: run Python code that comes with the reference.
        progress: called with (stage, what, done, total).

    Raises:
        InputError: the folder is no export or gives the last logits only, the reference is another model, the text
            does not do, or references or greedy cannot be had.
        CaptureError: the float model's graph is not what its witness computes, see `reader.check_reader`.
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    folder = Path(folder)
    if greedy < 0:
        raise InputError(f"{greedy} new tokens cannot be written", place="greedy", remedy="Take 0 for none")
    manifest = manifests.load(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(
            "cannot be written, and the report goes there", place=str(folder), remedy="Copy it to a folder you own"
        )
    with inside(folder, "validating"):
        checksums.check(folder)
        return _validate(
            folder, manifest, reference, text, windows, window, inputs, threads, provider, references, greedy,
            sensitivity, trust_remote_code, progress,
        )  # fmt: skip


def _validate(
    folder, manifest, reference, text, windows, window, inputs, threads, provider, references, greedy, sensitivity,
    trust_remote_code, progress,
) -> Report:  # fmt: skip
    seconds, started = {}, time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage], started = round(now - started, 2), now

    provider = None if provider is None else provider_named(provider)
    if references and manifest.kind != "decoder":
        raise InputError("references are for language models", place="references", remedy="Leave them out")
    check_all_logits(manifest, folder)
    captured = _capture(reference, inputs, manifest, trust_remote_code)
    if (folder / RECIPE_FILE).is_file():  # values are compared in the basis in which the export has them
        change_model(captured, Recipe.load(folder / RECIPE_FILE))
    transformed = transforms(folder)
    check_same_model(captured, manifest, folder, transformed=transformed)
    lap("capture")
    progress("check", "reading of the model", 0, 1)
    checked = check_reader(captured)
    progress("check", "reading of the model", 1, 1)
    lap("check")
    placed, plain = examine(folder, manifest, chosen_provider(provider, manifest))
    lap("placement")
    if captured.kind == "encoder":
        window = min(window, captured.settings.get("max_position_embeddings", window))
    if captured.kind != "module":
        chosen = choose_text(captured, text, windows, window, partial(progress, "text"))
        taken = _COSTED_WINDOWS if sensitivity else 1
        layer_feeds = _text_feeds(captured, chosen.windows[:taken, :_LAYER_TOKENS])
        rows = sum(batch["input_ids"].numel() for batch in layer_feeds)
    else:
        if text is not None:
            raise InputError("this model reads no text", place="text", remedy="Pass inputs=[(tensor, ...), ...]")
        layer_feeds = module_feeds(captured, _given(inputs), "inputs")
        rows = sum(next(iter(batch.values())).shape[0] for batch in layer_feeds)
        chosen = Text(torch.empty(0), f"{len(layer_feeds)} inputs given by the caller", False)
    lap("text")
    costs = None
    if sensitivity:
        costs = costs_of(folder, manifest, captured, layer_feeds, partial(progress, "costs"))
        lap("costs")
    layers = compare_layers(
        folder, manifest, captured, layer_feeds, plain, rows=rows, transformed=transformed, threads=threads,
        provider=provider, progress=partial(progress, "layers"), importance=costs.importance if costs else {},
    )  # fmt: skip
    lap("layers")
    restored = None
    if costs:
        restored = restore(
            folder, manifest, captured, layer_feeds, layers.linears, costs, transformed=transformed, threads=threads,
            provider=provider, progress=partial(progress, "restoring"),
        )  # fmt: skip
        lap("restoring")
    prompt = chosen.windows[0, :_LAYER_TOKENS] if captured.kind == "decoder" else None
    times = measure(folder, manifest, prompt=prompt, feeds=layer_feeds, threads=threads, provider=provider)
    layers = with_times(layers, manifest, times)
    lap("profile")
    logits, outputs, others, left_out, texts = None, (), (), (), None
    if captured.kind == "decoder":
        logits, others, left_out = _logits(
            folder, manifest, captured, chosen, threads, provider, progress, references, lap
        )
    else:
        feeds = layer_feeds if captured.kind == "module" else _text_feeds(captured, chosen.windows)
        outputs = _outputs(folder, manifest, captured, feeds, threads, provider, progress)
        lap("outputs")
    if captured.kind == "decoder" and greedy:
        texts = compare_greedy(
            captured, manifest, folder, chosen.windows, greedy, threads=threads, provider=provider,
            progress=partial(progress, "greedy"),
        )  # fmt: skip
        lap("greedy")
    name = public_name(captured.folder.name) if captured.folder else type(reference).__name__
    report = with_verdict(Report(
        reference=name, reader=checked, text=chosen.described, own_text=chosen.own, layers=layers, logits=logits,
        outputs=outputs, activations=exported_activations(folder), warnings=exported_warnings(folder), placement=placed,
        seconds=seconds, references=tuple(others),
        greedy=texts, sensitivity=restored, left_out=tuple(left_out), versions=versions(),
        settings=settings(
            reference, text, windows=windows, window=window, threads=threads, provider=provider,
            references=references, greedy=greedy, sensitivity=sensitivity,
        ),
    ))  # fmt: skip
    save(report, folder)
    _show(folder)
    return report


def _show(folder: Path) -> None:
    """Write report.html, and the model card with its numbers."""
    exported = read_validated(folder)
    write_html(exported)
    write_card(exported)


def _text_feeds(captured: CapturedModel, windows: torch.Tensor) -> list[Feeds]:
    """One batch for each window [n, S]."""
    if captured.kind == "decoder":
        return decoder_feeds(captured, windows)
    rows = with_last_token(windows, captured)
    return [encoder_batch(captured, ids[None], torch.ones_like(ids[None])) for ids in rows]


def _given(inputs) -> Sequence[Inputs]:
    if not inputs:
        raise InputError(
            "an nn.Module is compared on tensors", place="inputs", remedy="Pass inputs=[(tensor, ...), ...]"
        )
    return inputs


def _capture(reference, inputs, manifest: Manifest, trust_remote_code: bool) -> CapturedModel:
    if isinstance(reference, CapturedModel):
        return reference
    if isinstance(reference, torch.nn.Module):
        dims = manifest.settings.get("inputs")
        return capture_module(reference, _given(inputs)[0], axes_of(dims) if dims else None)
    return capture_folder(open_model(reference, trust_remote_code=trust_remote_code))


def _logits(folder, manifest: Manifest, captured: CapturedModel, text: Text, threads, provider, progress, forms, lap):
    """The deployed file's logits, other forms of the float model if `forms`, and what was left out of them."""
    reference = FloatOutputs(
        captured, decoder_feeds(captured, text.windows), ("logits",), partial(progress, "float model")
    )
    try:
        run = deployed_logits(folder, manifest, text.windows.shape[1], threads=threads, provider=provider)
        tokenizer = captured.folder.tokenizer() if captured.folder else None
        found = compare_logits(
            reference, text.windows, run, partial(progress, "logits"), decode=tokenizer and tokenizer.decode
        )
        del run  # one session at a time
        lap("outputs")
        if not forms:
            return found, (), ()
        others = compare_forms(
            captured, manifest, folder, reference, text.windows, threads=threads, provider=provider,
            progress=partial(progress, "references"),
        )  # fmt: skip
        lap("references")
        return found, *others
    finally:
        reference.close()


def _outputs(
    folder, manifest, captured: CapturedModel, feeds: Sequence[Feeds], threads, provider, progress
) -> tuple[ValueComparison, ...]:
    # A cache is the decoder's own: smoothing may rescale it and take that back where it is read.
    names = [
        port.name for port in captured.outputs if port.dtype.is_floating_point and not port.name.startswith("present.")
    ]
    reference = FloatOutputs(captured, feeds, names, partial(progress, "float model"))
    try:
        session = open_session(folder, manifest, threads=threads, provider=provider)
        pairs: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in names}
        for index, batch in enumerate(feeds):
            want, got = reference.outputs(index), run_session(session, batch, names)
            for name, (wanted, found) in pairs.items():
                wanted.append(want[name].flatten())
                found.append(got[name].float().flatten())
        return tuple(
            ValueComparison(name=name, **compare(torch.cat(want), torch.cat(got)))
            for name, (want, got) in pairs.items()
        )
    finally:
        reference.close()
