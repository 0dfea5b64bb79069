"""Comparing an exported encoder-decoder with the float model: part by part, and what it writes about whole sources."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...artifact.manifest import DECODER, ENCODER
from ...artifact.output import inside
from ...calibrate.data import Prepared
from ...calibrate.encoder_inputs import with_last_token
from ...capture.graph import CapturedModel
from ...capture.seq2seq import Parts, capture_seq2seq
from ...errors import InputError
from ...mixed_precision.sensitivity import InChain
from ...models.source import ModelFolder, open_model
from ...progress import StageProgress, announce, of_part
from ...recipe.recipe import CalibrationSpec
from ...runtime.seq2seq import EncoderDecoder, open_seq2seq
from ...validation.formatting import number
from ...validation.gates import Gates
from ...validation.greedy import alike
from ...validation.reference import FloatOutputs
from ...validation.report import Greedy, Logits, Reference, Report
from ...validation.report_store import KEY, keep
from ...validation.text import choose_text
from ...validation.verdict import beside_half, concluded, costliest, reference_problems
from ..measuring import FloatModel, check_writable, settings_of, stages, validate_file
from ..options import ValidationOptions
from ..parts import whole_report
from .chain import chains_of
from .exporting import by_name
from .logits import logits_of
from .references import compare_forms_of_parts
from .sources import Sources, batches_of, load_sources, write_about

_SEED = 0x5EED0F7E57  # of sources that nobody gave: others than any recipe's
_LAYER_BATCHES = 4  # sources on which values inside the parts are compared
_ORDER = (DECODER, ENCODER)  # gradients go back
_WINDOW = 128  # tokens of a source, where nobody says how many


def validate_parts(folder: Path, reference: FloatModel, options: ValidationOptions) -> Report:
    """Compare an export of an encoder-decoder with the float model; see `validate`, for its errors too."""
    _check(options)
    check_writable(folder)
    with inside(folder, "validating"):
        return _report(folder, _opened(reference, options), reference, options)


def _check(options: ValidationOptions) -> None:
    """Refuse what means nothing for an encoder-decoder."""
    if options.greedy < 2:
        raise InputError(f"{options.greedy} new tokens are too few to compare", place="greedy", remedy="Use 2 or more")
    if options.text is not None and options.inputs is not None:
        raise InputError("both give the sources", place="text, inputs", remedy="Give one of them")


def _opened(reference: FloatModel, options: ValidationOptions) -> ModelFolder:
    """The float model's folder.

    Raises:
        InputError: it is no encoder-decoder.
    """
    remedy = "Give the model that was exported"
    if isinstance(reference, torch.nn.Module | CapturedModel):
        raise InputError(
            "an encoder-decoder is compared with its folder", place=type(reference).__name__, remedy=remedy
        )
    model = open_model(reference, trust_remote_code=options.trust_remote_code)
    if not model.config.is_encoder_decoder:
        raise InputError("is not an encoder-decoder", place=model.name, remedy=remedy)
    return model


def _report(folder: Path, model: ModelFolder, reference: FloatModel, options: ValidationOptions) -> Report:
    progress = options.progress
    announce(progress, "capture", "text")
    for part in _ORDER:
        announce(of_part(progress, part), *stages("module", options))
    announce(progress, "logits", *(["references"] if options.references else []), "greedy")
    progress("capture", model.name, 0, 1)
    parts = capture_seq2seq(model, options.placement)
    progress("capture", model.name, 1, 1)
    sources = sources_of(parts, options)
    progress("text", "the float model writes about the sources", 0, 1)
    written = write_about(parts, sources, options.greedy)
    progress("text", "the float model writes about the sources", 1, 1)
    read = sources.batches[: len(written.batches)]
    reports = _reports(parts, folder, read[:_LAYER_BATCHES], written.batches[:_LAYER_BATCHES], options)
    pair = open_seq2seq(folder, threads=options.threads, provider=options.provider)
    logits = logits_of(parts, pair, read, written, partial(progress, "logits"))
    others, left_out = list[Reference](), list[str]()
    if options.references:
        others, left_out = compare_forms_of_parts(
            parts, folder, read, written.batches, threads=options.threads, provider=options.provider,
            progress=partial(progress, "references"),
        )  # fmt: skip
    greedy = _greedy(parts, pair, read, written, partial(progress, "greedy"))
    report, problems = whole_report(
        reports, text=sources.described, own_text=sources.own,
        logits=logits, greedy=greedy, gates=options.gates, settings=settings_of(reference, options, _WINDOW),
    )  # fmt: skip
    report = report.model_copy(update={"references": tuple(others), "left_out": tuple(left_out)})
    facts = [*_sentences(sources, logits, greedy), *beside_half(logits.kl_mean or 0.0, others), *left_out]
    report = concluded(report, (*problems, *reference_problems(others)), [*facts, *costliest(report)])
    keep(folder, KEY, report.model_dump(mode="json", exclude={"parts"}))  # which are in their folders
    return report


def _reports(
    parts: Parts, folder: Path, read: Sequence[dict[str, Tensor]], written: Sequence[Mapping[str, Tensor]],
    options: ValidationOptions,
) -> dict[str, Report]:  # fmt: skip
    """Both parts, each alone on what the float model hands to it."""
    chains: Mapping[str, InChain] = {}
    if options.sensitivity:
        chains = chains_of(parts, folder, read, written, threads=options.threads, provider=options.provider)
    batches, captured, found = {ENCODER: read, DECODER: written}, by_name(parts), {}
    for part in _ORDER:
        own = replace(
            options, text=None, inputs=batches[part], progress=of_part(options.progress, part), gates=Gates(),
            references=False,
        )  # fmt: skip
        found[part] = validate_file(folder / part, captured[part], own, chains.get(part))
    return {part: found[part] for part in captured}


def sources_of(parts: Parts, options: ValidationOptions) -> Sources:
    """What both models read to be compared: the options' inputs or texts, else what chance makes."""
    text, window = options.text, options.window or _WINDOW
    if options.inputs is None and text is not None and parts.encoder.inputs[0].name == "input_ids":
        chosen = choose_text(parts.encoder, text, options.windows, window, partial(options.progress, "text"))
        rows = list(with_last_token(chosen.windows, parts.encoder))
        return Sources(batches_of(parts, rows, 1), chosen.described)
    spec = CalibrationSpec(
        source="random" if text is None else os.fspath(text), samples=options.windows, sequence_length=window,
        seed=_SEED, batch_size=1,
    )  # fmt: skip
    return load_sources(parts, spec, options.inputs)


def _greedy(
    parts: Parts, pair: EncoderDecoder, sources: Sequence[dict[str, Tensor]], written: Prepared, progress: StageProgress
) -> Greedy:
    """Where the float model would part from what the export writes."""
    start = pair.habits.start
    count = written.batches[0]["input_ids"].shape[1] - len(start)
    texts = []
    for index, source in enumerate(sources):
        progress("sources", index, len(sources))
        pair.read({name: tensor.numpy() for name, tensor in source.items()})
        texts.append(torch.tensor(pair.decoder.generate([start], max_new_tokens=count).tokens))
    prompt = torch.tensor([start])
    feeds = [
        {**batch, "input_ids": torch.cat([prompt, text[:, :-1]], 1)}
        for batch, text in zip(written.batches, texts, strict=True)
    ]
    reference = FloatOutputs(parts.decoder, feeds, ("logits",), progress)
    try:
        likeliest = [reference.outputs(i)["logits"][0, len(start) - 1 :].argmax(-1) for i in range(len(texts))]
    finally:
        reference.close()
    agreed = tuple(alike(want, got[0]) for want, got in zip(likeliest, texts, strict=True))
    return Greedy(prompts=len(texts), prompt_tokens=len(start), new_tokens=count, agreed=agreed)


def _sentences(sources: Sources, logits: Logits, greedy: Greedy) -> list[str]:
    chance = ["The sources are random: give text of the kind that the model is for"] if sources.own else []
    return [
        f"KL {number(logits.kl_mean)} a token from the float model, and the same token likeliest for "
        f"{100 * logits.top1_agreement:.1f} % of {logits.tokens}",
        f"Both write the same about a source for {np.mean(greedy.agreed):.1f} of {greedy.new_tokens} tokens on average",
        *chance,
    ]
