"""Comparing an exported model of pictures and text with the float model: part by part, and all files in a chain."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...artifact.manifest import DECODER, EMBEDDING, PICTURE_PARTS, VISION
from ...artifact.output import inside
from ...capture.graph import CapturedModel
from ...capture.vision_language import FEATURES, VisionParts, capture_vision_language
from ...errors import InputError
from ...mixed_precision.sensitivity import InChain
from ...models.source import ModelFolder, open_model
from ...models.vision_language import in_three_parts
from ...progress import StageProgress, announce, of_part
from ...recipe.recipe import CalibrationSpec
from ...runtime.decoder import Decoder
from ...runtime.vision_language import PicturesAndText, open_vision_language
from ...validation.formatting import number
from ...validation.gates import Gates
from ...validation.greedy import alike
from ...validation.reference import FloatOutputs
from ...validation.report import Greedy, Logits, Reference, Report
from ...validation.report_store import KEY, keep
from ...validation.verdict import beside_half, concluded, costliest, reference_problems
from ..measuring import FloatModel, check_writable, settings_of, stages, validate_file
from ..options import ValidationOptions
from ..parts import whole_report
from .chain import carry_through, chains_of
from .logits import about_pictures, logits_of, starts_of
from .references import compare_forms_of_pictures
from .sources import Example, Examples, decoder_feeds, float_feeds, float_outputs, load_examples

_SEED = 0x5EED0F7E57  # of pictures and texts that nobody gave: others than any recipe's
_LAYER_BATCHES = 4  # prompts on which values inside the parts are compared
_WINDOW = 128  # tokens of a text, where nobody says how many


def validate_pictures(folder: Path, reference: FloatModel, options: ValidationOptions) -> Report:
    """Compare an export of a model of pictures and text with the float model; see `validate`, for its errors too."""
    if options.text is not None and options.inputs is not None:
        raise InputError("both give the text", place="text, inputs", remedy="Give one of them")
    model = _opened(reference, options)
    check_writable(folder)
    with inside(folder, "validating"):
        return _report(folder, model, reference, options)


def _opened(reference: FloatModel, options: ValidationOptions) -> ModelFolder:
    """The float model's folder.

    Raises:
        InputError: it is no model of pictures and text.
    """
    remedy = "Give the model that was exported"
    if isinstance(reference, torch.nn.Module | CapturedModel):
        raise InputError(
            "a model of pictures and text is compared with its folder", place=type(reference).__name__, remedy=remedy
        )
    model = open_model(reference, trust_remote_code=options.trust_remote_code)
    if not in_three_parts(model.config):
        raise InputError("is not a model of pictures and text", place=model.name, remedy=remedy)
    return model


def _report(folder: Path, model: ModelFolder, reference: FloatModel, options: ValidationOptions) -> Report:
    progress = options.progress
    announce(progress, "capture", "text")
    for part in PICTURE_PARTS:
        announce(of_part(progress, part), *stages("module", options))
    later = {"references": options.references, "greedy": options.greedy}
    announce(progress, "logits", *(stage for stage, wanted in later.items() if wanted))
    progress("capture", model.name, 0, 1)
    parts = capture_vision_language(model, options.placement)
    progress("capture", model.name, 1, 1)
    told = partial(progress, "text")
    examples = judged_examples(parts, options, told)
    feeds = float_feeds(parts, examples.batches, told)
    reports = _reports(parts, folder, examples.batches, feeds, options)
    about = about_pictures(examples.batches)
    longest = max(example.input_ids.shape[1] for example in examples.batches) + options.greedy
    chain = open_vision_language(folder, threads=options.threads, provider=options.provider, max_length=longest)
    logits = logits_of(parts, chain, about, feeds[DECODER], partial(progress, "logits"))
    others, left_out = list[Reference](), list[str]()
    if options.references:
        others, left_out = compare_forms_of_pictures(
            parts, folder, about, feeds, longest, threads=options.threads, provider=options.provider,
            progress=partial(progress, "references"),
        )  # fmt: skip
    greedy = None
    if options.greedy:
        greedy = _greedy(parts, chain, examples.batches, feeds, options.greedy, partial(progress, "greedy"))
    report, problems = whole_report(
        reports, text=examples.described, own_text=examples.own or options.text is None and options.inputs is None,
        logits=logits, greedy=greedy, gates=options.gates, settings=settings_of(reference, options, _WINDOW),
    )  # fmt: skip
    report = report.model_copy(update={"references": tuple(others), "left_out": tuple(left_out)})
    facts = [*_sentences(examples, logits, greedy), *beside_half(logits.kl_mean or 0.0, others), *left_out]
    report = concluded(report, (*problems, *reference_problems(others)), [*facts, *costliest(report)])
    keep(folder, KEY, report.model_dump(mode="json", exclude={"parts"}))  # which are in their folders
    return report


def judged_examples(parts: VisionParts, options: ValidationOptions, progress: StageProgress) -> Examples:
    """What both models read to be compared: the options' inputs or texts, else what the float one writes."""
    spec = CalibrationSpec(
        source="self" if options.text is None else os.fspath(options.text), samples=options.windows,
        sequence_length=options.window or _WINDOW, seed=_SEED, batch_size=1,
    )  # fmt: skip
    return load_examples(parts, spec, options.inputs, progress)


def _reports(
    parts: VisionParts, folder: Path, examples: Sequence[Example], feeds: Mapping[str, Sequence[dict[str, Tensor]]],
    options: ValidationOptions,
) -> dict[str, Report]:  # fmt: skip
    """All parts, each alone on what the float model hands to it."""
    read = {part: own[:_LAYER_BATCHES] for part, own in feeds.items()}
    chains: Mapping[str, InChain] = {}
    if options.sensitivity:
        chains = chains_of(
            parts, folder, examples[:_LAYER_BATCHES], read, threads=options.threads, provider=options.provider
        )  # fmt: skip
    found = {}
    for part in (DECODER, EMBEDDING, VISION):  # gradients go back
        own = replace(
            options, text=None, inputs=read[part], progress=of_part(options.progress, part), gates=Gates(),
            references=False, sensitivity=part in chains,
        )  # fmt: skip
        found[part] = validate_file(folder / part, parts.by_name[part], own, chains.get(part))
        if part == DECODER and chains:  # the embedding has no linears, but gradients pass through it
            carry_through(parts.embedding, read[EMBEDDING], chains[DECODER].carried)
    return {part: found[part] for part in PICTURE_PARTS}


def _greedy(
    parts: VisionParts, chain: tuple[PicturesAndText, Decoder], examples: Sequence[Example],
    feeds: dict[str, list[dict[str, Tensor]]], count: int, progress: StageProgress,
) -> Greedy:  # fmt: skip
    """Where the float model would part from what the export writes about each picture, behind the first of its text."""
    reader, decoder = chain
    prompts = [
        replace(e, input_ids=e.input_ids[:, : start + 2], written=torch.zeros(1, start + 2, dtype=torch.bool))
        for e, start in zip(examples, starts_of(examples), strict=True)
    ]
    texts = []
    for index, prompt in enumerate(prompts):
        progress("pictures", index, len(prompts))
        reader.read({name: tensor.numpy() for name, tensor in prompt.pictures.items()})
        made = decoder.generate(prompt.input_ids.tolist(), max_new_tokens=count, never=(reader.token,))
        texts.append(torch.tensor(made.tokens))
    whole = [
        replace(
            prompt, input_ids=torch.cat([prompt.input_ids, text[:, :-1]], 1),
            written=torch.cat([prompt.written, torch.ones_like(text[:, :-1], dtype=torch.bool)], 1),
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    read = [
        {"input_ids": example.input_ids, FEATURES: given[FEATURES]}
        for example, given in zip(whole, feeds[EMBEDDING], strict=True)
    ]
    merged = float_outputs(parts.embedding, read)
    again = [decoder_feeds(parts, *pair) for pair in zip(whole, merged, strict=True)]
    reference = FloatOutputs(parts.decoder, again, ("logits",), progress)
    never = parts.kind.token(parts.config)
    try:
        likeliest = []
        for index, prompt in enumerate(prompts):
            logits = reference.outputs(index)["logits"][0, prompt.input_ids.shape[1] - 1 :]
            if never < logits.shape[-1]:
                logits[:, never] = -torch.inf
            likeliest.append(logits.argmax(-1))
    finally:
        reference.close()
    agreed = tuple(alike(want, got[0]) for want, got in zip(likeliest, texts, strict=True))
    tokens = max(prompt.input_ids.shape[1] for prompt in prompts)
    return Greedy(prompts=len(prompts), prompt_tokens=tokens, new_tokens=count, agreed=agreed)


def _sentences(examples: Examples, logits: Logits, greedy: Greedy | None) -> list[str]:
    chance = ["The pictures and texts are random: give some of the kind that the model is for"] if examples.own else []
    written = [] if greedy is None else [
        f"Both write the same about a picture for {np.mean(greedy.agreed):.1f} of {greedy.new_tokens} tokens on average"
    ]  # fmt: skip
    return [
        f"KL {number(logits.kl_mean)} a token of the text after pictures, and the same token "
        f"likeliest for {100 * logits.top1_agreement:.1f} % of {logits.tokens}",
        *written, *chance,
    ]
