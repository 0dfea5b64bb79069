"""Comparing an exported model of pictures and text with the float model: part by part, and all files in a chain."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...artifact.manifest import DECODER, EMBEDDING, PICTURE_PARTS
from ...artifact.output import inside
from ...capture.graph import CapturedModel
from ...capture.vision_language import FEATURES, VisionParts, capture_vision_language
from ...errors import InputError
from ...models.source import ModelFolder, open_model
from ...models.vision_language import in_three_parts
from ...progress import StageProgress, announce, of_part
from ...recipe.recipe import CalibrationSpec
from ...runtime.decoder import Decoder
from ...runtime.vision_language import PicturesAndText, open_vision_language
from ...validation.formatting import number
from ...validation.gates import Gates
from ...validation.greedy import alike
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import Greedy, Logits, Report
from ...validation.report_store import KEY, keep
from ...validation.verdict import concluded
from ..measuring import FloatModel, check_writable, settings_of, stages, validate_file
from ..options import ValidationOptions
from ..parts import whole_report
from .sources import Example, Examples, decoder_feeds, float_feeds, float_outputs, load_examples

_SEED = 0x5EED0F7E57  # of pictures and texts that nobody gave: others than any recipe's
_LAYER_BATCHES = 4  # prompts on which values inside the parts are compared
_WINDOW = 128  # tokens of a text, where nobody says how many


def validate_pictures(folder: Path, reference: FloatModel, options: ValidationOptions) -> Report:
    """Compare an export of a model of pictures and text with the float model; see `validate`, for its errors too."""
    for name in ("references", "sensitivity"):
        if getattr(options, name):
            raise InputError(
                f"{name} cannot be measured for a model of pictures and text", place=str(folder), remedy="Leave it out"
            )
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
    announce(progress, "logits", *(["greedy"] if options.greedy else []))
    progress("capture", model.name, 0, 1)
    parts = capture_vision_language(model, options.placement)
    progress("capture", model.name, 1, 1)
    told = partial(progress, "text")
    spec = CalibrationSpec(
        source="self" if options.text is None else os.fspath(options.text), samples=options.windows,
        sequence_length=options.window or _WINDOW, seed=_SEED, batch_size=1,
    )  # fmt: skip
    examples = load_examples(parts, spec, options.inputs, told)
    feeds = float_feeds(parts, examples.batches, told)
    reports = {
        part: validate_file(
            folder / part, captured,
            replace(
                options, text=None, inputs=feeds[part][:_LAYER_BATCHES], progress=of_part(progress, part), gates=Gates()
            ),
        )
        for part, captured in parts.by_name.items()
    }  # fmt: skip
    longest = max(example.input_ids.shape[1] for example in examples.batches) + options.greedy
    chain = open_vision_language(folder, threads=options.threads, provider=options.provider, max_length=longest)
    logits = _logits(parts, chain, examples.batches, feeds, partial(progress, "logits"))
    greedy = None
    if options.greedy:
        greedy = _greedy(parts, chain, examples.batches, feeds, options.greedy, partial(progress, "greedy"))
    report, problems = whole_report(
        reports, text=examples.described, own_text=examples.own or options.text is None and options.inputs is None,
        logits=logits, greedy=greedy, gates=options.gates, settings=settings_of(reference, options, _WINDOW),
    )  # fmt: skip
    report = concluded(report, problems, _sentences(examples, logits, greedy))
    keep(folder, KEY, report.model_dump(mode="json", exclude={"parts"}))  # which are in their folders
    return report


class _Behind:
    """Logits of the float model behind the pictures of each prompt: in front of them there is no text to foretell."""

    def __init__(self, made: FloatOutputs, starts: Sequence[int], length: int):
        self._made, self._starts, self._length = made, starts, length

    def outputs(self, batch: int) -> dict[str, Tensor]:
        start = self._starts[batch]
        return {name: value[:, start : start + self._length] for name, value in self._made.outputs(batch).items()}


def _starts(examples: Sequence[Example]) -> list[int]:
    """Where the text about the pictures begins, by prompt: the last token in front of it is the first that counts."""
    return [max(int((~example.written[0]).sum()) - 1, 0) for example in examples]


def _logits(
    parts: VisionParts, chain: tuple[PicturesAndText, Decoder], examples: Sequence[Example],
    feeds: dict[str, list[dict[str, Tensor]]], progress: StageProgress,
) -> Logits:  # fmt: skip
    """Both models on the same prompts; the export reads the pictures itself."""
    reader, decoder = chain
    starts = _starts(examples)
    length = min(example.input_ids.shape[1] - start for example, start in zip(examples, starts, strict=True))
    if length < 2:
        raise InputError("no text follows a picture", place="text", remedy="Give texts about the pictures")
    windows = torch.stack([e.input_ids[0, s : s + length] for e, s in zip(examples, starts, strict=True)])
    waiting = iter(zip(examples, starts, strict=True))

    def deployed(ids: Tensor) -> Tensor:
        example, start = next(waiting)
        decoder.reset()
        reader.read({name: tensor.numpy() for name, tensor in example.pictures.items()})
        read = example.input_ids[:, : start + length].numpy()
        prompt, text = decoder.run(read[:, : start + 1])[0], decoder.run(read[:, start + 1 :])[0]
        return torch.tensor(np.concatenate([prompt[-1:], text]), dtype=torch.float32)

    made = FloatOutputs(parts.decoder, feeds[DECODER], ("logits",), progress)
    tokenizer = parts.decoder.origin.tokenizer()
    try:
        reference = _Behind(made, starts, length)
        return compare_logits(reference, windows, deployed, progress, decode=tokenizer and tokenizer.decode)
    finally:
        made.close()


def _greedy(
    parts: VisionParts, chain: tuple[PicturesAndText, Decoder], examples: Sequence[Example],
    feeds: dict[str, list[dict[str, Tensor]]], count: int, progress: StageProgress,
) -> Greedy:  # fmt: skip
    """Where the float model would part from what the export writes about each picture, behind the first of its text."""
    reader, decoder = chain
    prompts = [
        replace(e, input_ids=e.input_ids[:, : start + 2], written=torch.zeros(1, start + 2, dtype=torch.bool))
        for e, start in zip(examples, _starts(examples), strict=True)
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
