"""What the parts of a model of pictures and text read: pictures with text, and what the float model makes of both."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ...artifact.cache_names import is_past
from ...artifact.manifest import DECODER, EMBEDDING, VISION
from ...calibrate.data import Prepared
from ...calibrate.pictures import drawn_picture
from ...calibrate.self_text import continue_text
from ...calibrate.sources import check_source, load_samples
from ...capture.graph import CapturedModel
from ...capture.vision_language import FEATURES, VisionParts
from ...errors import InputError, QExportError
from ...models.loading import load_whole
from ...models.source import ModelFolder
from ...models.vision_language.prompts import random_words, with_pictures
from ...progress import StageProgress, no_stage_progress
from ...recipe.recipe import CalibrationSpec
from ...runtime.vision_language import open_processor, opened_pictures
from ...validation.reference import FloatOutputs

Feeds = dict[str, Tensor]
_PAIRS = (".jsonl", ".json")
_REMEDY = 'A line is {"image": "picture.png", "text": "what belongs to it"}, with paths from where the file lies'


@dataclass(frozen=True)
class Example:
    """Pictures and a text about them.

    Attributes:
        input_ids: int64 [batch, sequence], without padding.
        pictures: what the encoder reads, by name, those of the first row first.
        written: bool [batch, sequence], tokens that are written about pictures, and no prompt.
    """

    input_ids: Tensor
    pictures: Feeds
    written: Tensor


@dataclass(frozen=True)
class Examples:
    """What all parts are calibrated or compared on.

    Attributes:
        batches: in order.
        described: what they are, for reports.
        own: chance made the pictures and the text, so that measures say little.
    """

    batches: list[Example]
    described: str
    own: bool = False


def check_examples(folder: ModelFolder, spec: CalibrationSpec, data: Any) -> None:
    """Find out before the work begins that pictures with text cannot be had.

    Raises:
        InputError: as said.
    """
    if data is not None or spec.source in ("random", "self"):
        return
    if _is_pairs(spec.source):
        _read_pairs(Path(spec.source).expanduser())
        open_processor(folder.path)
    else:
        check_source(spec, folder.tokenizer())


def load_examples(parts: VisionParts, spec: CalibrationSpec, data: Any, progress: StageProgress) -> Examples:
    """The pictures and texts that `spec` names, or those in `data`.

    Args:
        data: pairs of pictures (or a list of them) and text, as `generate` takes pictures; or what the model's
            processor makes of such, mappings with input_ids [1, sequence]. None for what spec.source names: a file of
            pairs (.jsonl), a text, whose stretches go with drawn pictures, "self" for text that the float model writes
            about drawn pictures, "random" for random tokens and numbers.

    Raises:
        InputError: there are none, or they are not what the model reads.
    """
    source = spec.source
    if data is not None:
        return _given(parts, list(data)[: spec.samples], spec.batch_size)
    if _is_pairs(source):
        pairs = _read_pairs(Path(source).expanduser())[: spec.samples]
        made = [_processed(parts, images, text) for images, text in pairs]
        return Examples(_batched(made, spec.batch_size), f"{len(made)} pictures with text of {Path(source).name}")
    random = torch.Generator().manual_seed(spec.seed)
    size = int(parts.decoder.settings["vocab_size"])
    length = max(spec.sequence_length, 2)
    if source == "random":
        pictures = [parts.kind.example(parts.config, 1, random) for _ in range(spec.samples)]
        words = random_words(size, parts.kind.reserved(parts.config), (spec.samples, length), random)
        described = f"{spec.samples} pictures of random numbers, each with {length} random tokens (seed {spec.seed})"
        return Examples(_together(parts, pictures, words, spec.batch_size), described, True)
    pictures = [_drawn(parts, spec.seed + number, random) for number in range(spec.samples)]
    if source == "self":
        return _written(parts, pictures, spec, length, progress)
    samples = load_samples(spec, None, tokenizer=parts.decoder.origin.tokenizer(), vocab_size=size)
    rows = [ids[mask.bool()] for ids, mask in zip(samples.input_ids, samples.attention_mask, strict=True)]
    made = _together(parts, pictures, rows, spec.batch_size)
    return Examples(made, f"drawn pictures, each with text: {samples.described}")


def float_feeds(
    parts: VisionParts, examples: Sequence[Example], progress: StageProgress = no_stage_progress
) -> dict[str, list[Feeds]]:
    """What each part reads of examples, by its name: of the float model, a batch for each.

    One block of it is in memory at a time.
    """
    pictures = [example.pictures for example in examples]
    features = float_outputs(parts.vision, pictures, progress)
    tokens = [{"input_ids": example.input_ids, **rows} for example, rows in zip(examples, features, strict=True)]
    merged = float_outputs(parts.embedding, tokens, progress)
    read = [decoder_feeds(parts, *pair) for pair in zip(examples, merged, strict=True)]
    return {VISION: pictures, EMBEDDING: tokens, DECODER: read}


def decoder_feeds(parts: VisionParts, example: Example, merged: Feeds) -> Feeds:
    """All that the decoder reads of a prompt, the cache empty.

    Args:
        merged: what the embedding makes of it.
    """
    ids = example.input_ids
    places = parts.kind.places(parts.config, ids, example.pictures)
    told = parts.kind.told(parts.config, example.written)
    feeds = {**merged, "attention_mask": torch.ones_like(ids), "position_ids": places, **told}
    empty = {port.name: port.empty(len(ids)) for port in parts.decoder.inputs if is_past(port.name)}
    return feeds | empty


def float_outputs(
    captured: CapturedModel, feeds: Sequence[Feeds], progress: StageProgress = no_stage_progress
) -> list[Feeds]:
    """All outputs of a part of the float model for each batch, by name."""
    made = FloatOutputs(captured, feeds, [port.name for port in captured.outputs], progress)
    try:
        return [made.outputs(index) for index in range(len(feeds))]
    finally:
        made.close()


def calibration_data(parts: VisionParts, examples: Examples, progress: StageProgress) -> dict[str, Prepared]:
    """What each part is calibrated on, by its name.

    The decoder sees all tokens, whose largest values bound ranges. Sums and samples are taken of every token of text
    and of as many of pictures at most: there are far more of these in a prompt, and errors at them cost less (MBQ,
    arXiv 2412.19509, finds gradients a tenth as large).
    """
    feeds = float_feeds(parts, examples.batches, progress)
    stands = parts.kind.token(parts.config)
    counted = [balanced(example.input_ids != stands) for example in examples.batches]
    return {
        name: Prepared(read, examples.described, examples.own, counted if name == DECODER else None)
        for name, read in feeds.items()
    }


def balanced(text: Tensor) -> Tensor:
    """Tokens that count: those of text, and as many others at most, spread evenly in each row.

    Args:
        text: bool [batch, sequence], tokens that are text.
    """
    counted = text.clone()
    for row, words in zip(counted, text, strict=True):
        others = torch.nonzero(~words)[:, 0]
        many = min(len(others), int(words.sum()))
        if many:
            row[others[torch.arange(many) * len(others) // many]] = True
    return counted


def _is_pairs(source: str) -> bool:
    return Path(source).suffix.lower() in _PAIRS


def _read_pairs(path: Path) -> list[tuple[list[Any], str]]:
    """Pictures and text of every line of a file.

    Raises:
        InputError: it cannot be read, or a line is no such pair.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", place=str(path), remedy=_REMEDY) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            images = entry["images"] if "images" in entry else [entry["image"]]
            text = entry["text"]
        except (ValueError, KeyError, TypeError):
            images, text = None, None
        if not isinstance(images, list) or not images or not isinstance(text, str):
            raise InputError("is not a picture with its text", place=f"{path}:{number}", remedy=_REMEDY)
        found.append(([path.parent / str(image) for image in images], text))
    if not found:
        raise InputError("holds no pictures", place=str(path), remedy=_REMEDY)
    return found


def _processor(parts: VisionParts) -> Any:
    return open_processor(parts.decoder.origin.path)


def _processed(parts: VisionParts, images: Sequence[Any], text: str) -> Example:
    """What the model's processor makes of pictures and a text behind them."""
    processor = _processor(parts)
    stand = str(processor.image_token)
    pictures = opened_pictures(images)
    try:
        read = parts.kind.texts(stand * (len(pictures) - text.count(stand)) + text, stand)
        made = processor(images=[pictures], return_tensors="pt", **read)
    except QExportError:
        raise
    except Exception as error:  # of transformers' code, on what people bring
        raise InputError(f"its processor cannot read them ({error})", place=text[:40]) from error
    return _checked(parts, made)


def _checked(parts: VisionParts, made: Mapping[str, Any]) -> Example:
    """The tensors of one text that the parts read.

    Raises:
        InputError: one is missing, or tokens and rows of features do not fit together.
    """
    ports = parts.vision.inputs
    absent = [name for name in ("input_ids", *(port.name for port in ports)) if name not in made]
    if absent:
        remedy = "Give what the model's processor makes"
        raise InputError(f"there is no {absent[0]}", place="calibration", remedy=remedy)
    ids, pictures = torch.as_tensor(made["input_ids"]).long(), {}
    for port in ports:
        value = torch.as_tensor(np.asarray(made[port.name])).to(port.dtype)
        pictures[port.name] = value.reshape(-1, *value.shape[value.dim() - len(port.dims) + 1 :])
    ids = ids.reshape(1, -1) if ids.dim() == 1 else ids
    return Example(ids, pictures, parts.kind.written(parts.config, ids, made))


def _given(parts: VisionParts, data: Sequence[Any], size: int) -> Examples:
    made = []
    for entry in data:
        if isinstance(entry, Mapping):
            made.append(_checked(parts, entry))
        elif isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], str):
            images = entry[0] if isinstance(entry[0], list | tuple) else [entry[0]]
            made.append(_processed(parts, images, entry[1]))
        else:
            raise InputError(
                f"{type(entry).__name__} is not a picture with its text", place="calibration",
                remedy="Pass pairs of a picture and its text, or what the model's processor makes of them",
            )  # fmt: skip
    if not made:
        raise InputError("there are none", place="calibration", remedy="Pass pairs of a picture and its text")
    return Examples(_batched(made, size), f"{len(made)} pictures with text given by the caller")


def _drawn(parts: VisionParts, seed: int, random: torch.Generator) -> Feeds:
    """A drawn picture as the model's processor makes it, or random numbers where there is no processor."""
    try:
        processor = _processor(parts)
    except InputError:
        return parts.kind.example(parts.config, 1, random)
    made = processor.image_processor(images=[drawn_picture(seed)], return_tensors="pt")
    return _checked(parts, {"input_ids": torch.zeros(1, 1), **made}).pictures


def _counts(parts: VisionParts, pictures: Sequence[Feeds]) -> list[list[int]]:
    """Rows of features of every picture, for each list of pictures."""
    features = float_outputs(parts.vision, pictures)
    return [parts.kind.rows(parts.config, p, len(made[FEATURES])) for p, made in zip(pictures, features, strict=True)]


def _together(parts: VisionParts, pictures: Sequence[Feeds], words: Any, size: int) -> list[Example]:
    """Pictures with tokens behind them, a text for each, as long as the model reads; those of one length in batches."""
    made, longest = [], _longest(parts)
    for given, text, counts in zip(pictures, words, _counts(parts, pictures), strict=False):
        ids = with_pictures(text, [parts.kind.placeholder(parts.config, count) for count in counts])[:longest]
        made.append(Example(ids[None], given, parts.kind.written(parts.config, ids[None])))
    return _batched(made, size)


def _longest(parts: VisionParts) -> int:
    """Tokens that the decoder reads at most, those of pictures too."""
    return int(parts.decoder.settings.get("max_position_embeddings") or sys.maxsize)


def _batched(made: Sequence[Example], size: int) -> list[Example]:
    """Neighbours of one length together, at most `size` of them."""
    return [_stacked(group) for group in _groups(made, size)]


def _groups(made: Sequence[Example], size: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in made:
        if group and (len(group) == size or example.input_ids.shape != group[0].input_ids.shape):
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def _stacked(group: Sequence[Example]) -> Example:
    pictures = {name: torch.cat([example.pictures[name] for example in group]) for name in group[0].pictures}
    ids, written = (torch.cat([getattr(e, name) for e in group]) for name in ("input_ids", "written"))
    return Example(ids, pictures, written)


def _written(
    parts: VisionParts, pictures: Sequence[Feeds], spec: CalibrationSpec, length: int, progress: StageProgress
) -> Examples:
    """Texts that the float model writes about pictures; it is in memory as a whole."""
    folder = parts.decoder.origin
    model = load_whole(folder, parts.kind.loader).model if parts.model is None else parts.model
    text = parts.config.get_text_config()
    start = next(
        (t for name in ("bos_token_id", "eos_token_id") if isinstance(t := getattr(text, name, None), int)), 0
    )  # fmt: skip
    ends = getattr(text, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    never = [*parts.kind.reserved(parts.config), *ends]
    prompts = _together(parts, pictures, [torch.tensor([start])] * len(pictures), spec.batch_size)
    random, made = torch.Generator().manual_seed(spec.seed), list[Example]()
    for index, prompt in enumerate(prompts):
        progress("the model writes about pictures", index, len(prompts))
        cache = DynamicCache(config=model.config)

        def step(ids: Tensor, past: Any, prompt=prompt, cache=cache) -> tuple[Tensor, Any]:
            first = parts.kind.given(prompt.pictures, len(ids)) if past is None else {}
            beside = parts.kind.beside(parts.config, ids)
            with torch.no_grad():
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **first, **beside).logits[:, -1]
            return logits.index_fill(-1, torch.tensor([t for t in never if t < logits.shape[-1]]), -math.inf), cache

        left = _longest(parts) - prompt.input_ids.shape[1]
        ids = continue_text(step, prompt.input_ids, min(length - 1, left), random)
        made.append(Example(ids, prompt.pictures, parts.kind.written(parts.config, ids)))
    described = f"{len(pictures)} texts of {length} tokens that the model writes about drawn pictures"
    return Examples(made, described)
