"""Comparing one file with the float model that it was made from, and writing the result into its folder."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..artifact import checksums
from ..artifact import manifest as manifests
from ..artifact.cache_names import is_present
from ..artifact.manifest import RECIPE_FILE, Manifest
from ..artifact.names import public_name
from ..artifact.output import inside
from ..artifact.scratch import scratch_folder
from ..calibrate.block_activations import module_feeds
from ..calibrate.data import Prepared, module_inputs
from ..calibrate.encoder_inputs import encoder_batch, with_last_token
from ..calibrate.model_passes import change_model
from ..capture.graph import CapturedModel
from ..capture.module import Inputs, axes_of
from ..errors import InputError, writing_to
from ..lower.adapter_inputs import with_adapter_inside
from ..mixed_precision.costs import Costs
from ..mixed_precision.sensitivity import InChain, costs_of, restore
from ..models.agreement import ReaderAgreement
from ..models.heads import Decision
from ..models.source import ModelFolder
from ..progress import announce
from ..recipe.recipe import CalibrationSpec, Recipe
from ..report import describe_foreign, read_validated, write_card, write_html
from ..runtime.provider import chosen_provider
from ..runtime.session import open_session
from ..validation.account import transforms
from ..validation.decisions import decisions
from ..validation.environment import settings, versions
from ..validation.float_forms import compare_forms
from ..validation.foreign import Described, whole_logits
from ..validation.greedy import compare_greedy
from ..validation.layers import compare, compare_layers
from ..validation.logits import check_all_logits, compare_logits, deployed_logits
from ..validation.placement import examine
from ..validation.reader import check_reader
from ..validation.reference import Feeds, FloatOutputs, check_same_model, decoder_feeds
from ..validation.report import Logits, Reference, Report, ValueComparison
from ..validation.report_store import exported_activations, exported_warnings, save
from ..validation.running import run_session
from ..validation.text import OWN_SEED, Text, choose_text
from ..validation.timing import measure, with_times
from ..validation.verdict import with_verdict
from .options import ValidationOptions
from .stages.capturing import capture_model

# Tokens on which values inside the model are compared: enough rows for every statistic, few enough to hold a block's.
_LAYER_TOKENS = 256
_LONGEST = "max_position_embeddings"
_COSTED_WINDOWS = 4  # whose first tokens these are, where costs in KL are measured
WINDOW = 512  # tokens of a window, where nobody says how many

FloatModel = str | os.PathLike[str] | ModelFolder | torch.nn.Module | CapturedModel


@dataclass(frozen=True)
class Subject:
    """An export and the float model that it was made from.

    Attributes:
        folder: the export; manifest: what is in it.
        captured: the float model, in the basis in which the export has its values.
        transformed: see `validation.account.transforms`.
        options: how they are compared.
        described: what the file is, where qexport did not write it; its working copy is in `folder`.
        chain: of a part of a model whose sensitivity is measured.
    """

    folder: Path
    manifest: Manifest
    captured: CapturedModel
    transformed: bool
    options: ValidationOptions
    described: Described | None = None
    chain: InChain | None = None

    @property
    def stepwise(self) -> bool:
        """Whether the file goes through a text token by token."""
        decoder = self.captured.kind == "decoder" and self.captured.reads_text
        return decoder and (self.described is None or self.described.cached)

    def feeds(self, feeds: Sequence[Feeds]) -> Sequence[Feeds]:
        """Inputs of the float model with what else the file reads."""
        return feeds if self.described is None else self.described.feeds(feeds)


@dataclass(frozen=True)
class Read:
    """What both models read.

    Attributes:
        text: the windows; those of a model without text are empty.
        feeds: on which values inside the model are compared, a batch each.
        rows: of every value, over all of them.
    """

    text: Text
    feeds: Sequence[Feeds]
    rows: int


class Laps:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._started = round(now - self._started, 2), now


def validate_file(
    folder: Path, reference: FloatModel, options: ValidationOptions, chain: InChain | None = None
) -> Report:
    """Compare an export that is one file with the float model; see `validate`, for its errors too.

    Args:
        chain: of a part of a model whose sensitivity is measured.
    """
    manifest = manifests.load(folder)
    check_writable(folder)
    with inside(folder, "validating"):
        checksums.check(folder)
        report = _report(folder, manifest, reference, options, chain)
        save(report, folder)
        exported = read_validated(folder)
        write_html(exported)
        write_card(exported)
    return report


def validate_with_adapter(folder: Path, name: str, reference: FloatModel, options: ValidationOptions) -> Report:
    """Compare an export that runs with one of its adapters; the page goes where the options say, if they say so.

    Args:
        reference: the float model with the same adapter.

    Raises:
        InputError: as `validate_file`, or there is no such adapter.
    """
    manifest = manifests.load(folder)
    checksums.check(folder)
    with scratch_folder() as place:
        with_adapter_inside(folder, manifest, name, place)
        report = _report(place, manifest, reference, replace(options, out=None))
    if options.out is not None:
        write_report(report, manifest, options.out)
    return report


def write_report(report: Report, manifest: Manifest, out: Path) -> None:
    """A report with its page in a folder that is no export.

    Raises:
        InputError: the folder cannot be made or written.
    """
    with writing_to(out, "Free some space"):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    save(report, out)
    describe_foreign(out, manifest)
    write_html(read_validated(out))


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot take a report.

    Raises:
        InputError: it cannot be written.
    """
    if not os.access(folder, os.W_OK):
        raise InputError(
            "cannot be written to, and the report belongs there", place=str(folder),
            remedy="Copy it to a folder you own"
        )


def stages(kind: str, options: ValidationOptions, foreign: bool = False) -> list[str]:
    """What progress of a validation speaks of, in order, for a kind of model; foreign: of another tool's file."""
    decoder, costs = kind == "decoder", options.sensitivity
    there = {
        "text": kind != "module", "matching": foreign, "costs": costs, "restoring": costs, "logits": decoder,
        "references": decoder and bool(options.references), "greedy": decoder and bool(options.greedy),
    }  # fmt: skip
    order = (
        "capture", "check", "text", "matching", "costs", "layers", "restoring", "times", "float model", "logits",
        "references", "greedy",
    )  # fmt: skip
    return [stage for stage in order if there.get(stage, True)]


def _report(
    folder: Path, manifest: Manifest, reference: FloatModel, options: ValidationOptions, chain: InChain | None = None
) -> Report:
    laps = Laps()
    if options.out is not None:
        raise InputError("the report of an export goes into its folder", place="out", remedy="Leave it out")
    if options.references and manifest.kind != "decoder":
        raise InputError("references are only for language models", place="references", remedy="Leave them out")
    if options.gates.asked and manifest.kind != "decoder":
        raise InputError("limits are for language models, and this model predicts no next token", place="gates")
    check_all_logits(manifest, folder)
    announce(options.progress, *stages(manifest.kind, options))
    captured = captured_for(reference, manifest, options)
    if (folder / RECIPE_FILE).is_file():  # values are compared in the basis in which the export has them
        change_model(captured, Recipe.load(folder / RECIPE_FILE))
    subject = Subject(folder, manifest, captured, transforms(folder), options, chain=chain)
    check_same_model(captured, manifest, folder, transformed=subject.transformed)
    if _LONGEST in manifest.settings:  # an export may read shorter texts than its model
        captured.settings[_LONGEST] = manifest.settings[_LONGEST]
    laps.lap("capture")
    checked = checked_reader(captured, options)
    laps.lap("check")
    read = read_by(captured, options)
    laps.lap("text")
    return told(compared(subject, read, laps), captured, reference, checked, options)


def checked_reader(captured: CapturedModel, options: ValidationOptions) -> ReaderAgreement:
    """See `validation.reader.check_reader`."""
    options.progress("check", "reading of the model", 0, 1)
    checked = check_reader(captured)
    options.progress("check", "reading of the model", 1, 1)
    return checked


def told(
    report: Report, captured: CapturedModel, reference: FloatModel, checked: ReaderAgreement, options: ValidationOptions
) -> Report:
    """A report with what it is about, and its verdict."""
    return with_verdict(report.model_copy(update={
        "reference": public_name(captured.folder.name) if captured.folder else type(reference).__name__,
        "reader": checked, "settings": settings_of(reference, options, WINDOW),
    }))  # fmt: skip


def compared(subject: Subject, read: Read, laps: Laps) -> Report:
    """Everything that running both models shows; `told` adds the rest."""
    folder, manifest, captured, options = subject.folder, subject.manifest, subject.captured, subject.options
    progress, described = options.progress, subject.described
    placed, plain = examine(folder, manifest, chosen_provider(options.provider, manifest))
    laps.lap("placement")
    feeds = subject.feeds(read.feeds)
    costs: Costs | None = None
    if options.sensitivity:
        costs = costs_of(folder, manifest, captured, feeds, partial(progress, "costs"), subject.chain)
        laps.lap("costs")
    layers = compare_layers(
        folder, manifest, captured, feeds, plain, rows=read.rows, transformed=subject.transformed,
        threads=options.threads, provider=options.provider, progress=partial(progress, "layers"),
        importance=costs.importance if costs else {}, faults=described.faults if described else None,
    )  # fmt: skip
    laps.lap("layers")
    restored = None
    if costs:
        restored = restore(
            folder, manifest, captured, feeds, layers.linears, costs, transformed=subject.transformed,
            threads=options.threads, provider=options.provider, progress=partial(progress, "restoring"),
            chain=subject.chain,
        )  # fmt: skip
        laps.lap("restoring")
    decoder = captured.kind == "decoder" and captured.reads_text
    prompt = read.text.windows[0, :_LAYER_TOKENS] if subject.stepwise else None
    progress("times", "of operators", 0, 1)
    times = measure(
        folder, manifest, prompt=prompt, feeds=feeds, threads=options.threads, provider=options.provider
    )
    progress("times", "of operators", 1, 1)
    layers = with_times(layers, manifest, times)
    laps.lap("profile")
    logits, texts = None, None
    outputs: tuple[ValueComparison, ...] = ()
    others: Sequence[Reference] = ()
    left_out: Sequence[str] = ()
    if decoder:
        logits, others, left_out = _logits(subject, read.text, laps)
    else:
        outputs = _outputs(subject, read)
        laps.lap("outputs")
    if decoder and options.greedy and not subject.stepwise:
        left_out = (*left_out, "nothing is written greedily: the file has no cache")
    elif decoder and options.greedy:
        texts = compare_greedy(
            captured, manifest, folder, read.text.windows, options.greedy, threads=options.threads,
            provider=options.provider, progress=partial(progress, "greedy"),
        )  # fmt: skip
        laps.lap("greedy")
    return Report(
        reference="", text=read.text.described, own_text=read.text.own, layers=layers, logits=logits,
        outputs=outputs, activations=exported_activations(folder), warnings=exported_warnings(folder), placement=placed,
        seconds=laps.seconds, references=tuple(others), greedy=texts, sensitivity=restored, left_out=tuple(left_out),
        gates=options.gates.of(logits) if logits else (), versions=versions(),
        foreign=described.facts if described else None,
    )  # fmt: skip


def settings_of(reference: FloatModel, options: ValidationOptions, window: int) -> dict[str, object]:
    """What `validate` was called with, for the report.

    Args:
        window: tokens of one, where nobody says how many.
    """
    return settings(
        reference, options.text, windows=options.windows, window=options.window or window, threads=options.threads,
        provider=options.provider, references=options.references, greedy=options.greedy,
        sensitivity=options.sensitivity,
    )  # fmt: skip


def captured_for(reference: FloatModel, manifest: Manifest, options: ValidationOptions) -> CapturedModel:
    options.progress("capture", "the float model", 0, 1)
    inputs, axes = None, None
    if isinstance(reference, torch.nn.Module):
        inputs, dims = _given(options.inputs)[0], manifest.settings.get("inputs")
        axes = axes_of(dims) if dims else None
    captured = capture_model(
        reference, inputs, axes, trust_remote_code=options.trust_remote_code, placement=options.placement
    )
    options.progress("capture", "the float model", 1, 1)
    return captured


def _given(inputs: Sequence[Inputs] | Sequence[str] | torch.Tensor | None) -> Sequence[Inputs]:
    given = () if inputs is None or isinstance(inputs, torch.Tensor) else inputs
    entries = [entry for entry in given if not isinstance(entry, str)]
    if not entries or len(entries) < len(given):
        raise InputError(
            "an nn.Module is compared on tensors", place="inputs", remedy="Pass inputs=[(tensor, ...), ...]"
        )
    return entries


def read_by(captured: CapturedModel, options: ValidationOptions) -> Read:
    """The text, or what is read instead."""
    if not captured.reads_text:
        found = _module_inputs(captured, options)
        rows = sum(next(iter(batch.values())).shape[0] for batch in found.batches)
        return Read(Text(torch.empty(0), found.described, found.own), found.batches, rows)
    if options.inputs is not None:
        raise InputError("this model reads text, not tensors", place="inputs", remedy="Pass text=...")
    window = options.window or WINDOW
    longest = captured.settings.get(_LONGEST, window)
    if captured.kind == "encoder" or options.window is None:
        window = min(window, longest)
    elif window > longest:
        raise InputError(
            f"a window of {window} tokens is longer than the {longest} that the file reads", place="window"
        )
    chosen = choose_text(captured, options.text, options.windows, window, partial(options.progress, "text"))
    taken = _COSTED_WINDOWS if options.sensitivity else 1
    texts = _text_feeds(captured, chosen.windows[:taken, :_LAYER_TOKENS])
    return Read(chosen, texts, sum(batch["input_ids"].numel() for batch in texts))


def _module_inputs(captured: CapturedModel, options: ValidationOptions) -> Prepared:
    if captured.folder is None:
        if options.text is not None:
            raise InputError("this model reads no text", place="text", remedy="Pass inputs=[(tensor, ...), ...]")
        feeds = module_feeds(captured, _given(options.inputs), "inputs")
        return Prepared(feeds, f"{len(feeds)} inputs given by the caller")
    source = "random" if options.text is None else os.fspath(options.text)
    spec = CalibrationSpec(source=source, samples=options.windows, seed=OWN_SEED, batch_size=1)
    return module_inputs(captured, spec, options.inputs, "inputs")


def _text_feeds(captured: CapturedModel, windows: torch.Tensor) -> Sequence[Feeds]:
    """One batch for each window [n, S], or for a choice between two."""
    if captured.kind == "decoder":
        return decoder_feeds(captured, windows)
    rows = with_last_token(windows, captured).split(2 if len(captured.inputs[0].dims) > 2 else 1)
    return [encoder_batch(captured, ids, torch.ones_like(ids)) for ids in rows]


def _logits(subject: Subject, text: Text, laps: Laps) -> tuple[Logits, Sequence[Reference], Sequence[str]]:
    """The deployed file's logits, other forms of the float model if asked for, and what was left out of them."""
    captured, options, progress = subject.captured, subject.options, subject.options.progress
    reference = FloatOutputs(
        captured, decoder_feeds(captured, text.windows), ("logits",), partial(progress, "float model")
    )
    try:
        if subject.described is not None and not subject.stepwise:
            run = whole_logits(subject.described, captured, threads=options.threads, provider=options.provider)
        else:
            run = deployed_logits(
                subject.folder, subject.manifest, text.windows.shape[1], threads=options.threads,
                provider=options.provider,
            )  # fmt: skip
        tokenizer = captured.folder.tokenizer() if captured.folder else None
        found = compare_logits(
            reference, text.windows, run, partial(progress, "logits"), decode=tokenizer and tokenizer.decode
        )
        del run  # one session at a time
        laps.lap("outputs")
        if not options.references:
            return found, (), ()
        others, left_out = compare_forms(
            captured, subject.manifest, subject.folder, reference, text.windows, threads=options.threads,
            provider=options.provider, progress=partial(progress, "references"),
        )  # fmt: skip
        laps.lap("references")
        return found, others, left_out
    finally:
        reference.close()


def _compared(
    name: str, wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], decides: Decision
) -> ValueComparison:
    want, got = (torch.cat([tensor.flatten() for tensor in values]) for values in (wanted, found))
    if want.is_floating_point():
        decided = decisions(name, wanted, [tensor.float() for tensor in found], decides)
        return ValueComparison.model_validate({"name": name, **compare(want, got.float()), **decided})
    off = (want.double() - got.double()).abs()
    share = float((off == 0).double().mean()) if len(off) else 1.0
    return ValueComparison(name=name, equal_share=share, max_abs_error=float(off.max()) if len(off) else 0.0)


def _outputs(subject: Subject, read: Read) -> tuple[ValueComparison, ...]:
    captured, options = subject.captured, subject.options
    feeds = read.feeds if not captured.reads_text else _text_feeds(captured, read.text.windows)
    # A cache is the decoder's own: smoothing may rescale it and take that back where it is read.
    names = [port.name for port in captured.outputs if not is_present(port.name)]
    decides = captured.settings.get("decides", "")
    reference = FloatOutputs(captured, feeds, names, partial(options.progress, "float model"))
    try:
        session = open_session(subject.folder, subject.manifest, threads=options.threads, provider=options.provider)
        made = {value.name for value in session.get_outputs()}
        names = [name for name in names if name in made]  # a foreign file may have fewer
        pairs: Mapping[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in names}
        for index, batch in enumerate(feeds):
            want, got = reference.outputs(index), run_session(session, subject.feeds([batch])[0], names)
            for name, (wanted, found) in pairs.items():
                wanted.append(want[name])
                found.append(got[name])
        return tuple(_compared(name, want, got, decides) for name, (want, got) in pairs.items())
    finally:
        reference.close()
