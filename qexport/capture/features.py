"""Capturing what reads pictures, films or sound from a folder, with the head that its config names.

What compares pictures with texts (CLIP) reads both.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..artifact.files import read_json
from ..errors import CaptureError
from ..models.heads import Head, compares, decision_of
from ..models.loading import load_whole
from ..models.source import ModelFolder
from ..models.transformers_witness.encoder import EncoderWitness
from ..models.vision_language import COUNT
from .dynamic import Axes
from .graph import BATCH, CapturedModel
from .module import capture_module

PROCESSOR = "preprocessor_config.json"
IDS, _PICTURES = "input_ids", "pixel_values"
_TEXTS = ((3, 7), (2, 9))  # rows and tokens of texts beside pictures, of which there are two and then three
_BATCH, _SIDE, _SECOND = 2, 224, 16000  # rows; pixels where nothing says how many; numbers of a second of sound
_FRAMES = 98  # of a second in spectrograms of any length


@dataclass(frozen=True)
class Reading:
    """What a model reads.

    Attributes:
        dims: of its input; a name for a dimension that is free.
        example: size of each, to trace with.
        note: a sentence on what the sizes mean for who uses the file.
    """

    dims: tuple[int | str, ...]
    example: tuple[int, ...]
    note: str


def capture_features(folder: ModelFolder, head: Head) -> CapturedModel:
    """Capture a model of pictures, films or sound as a module with one input, which is called as in transformers.

    Pictures have the size that the folder's preprocessor_config.json says, or its config. Sound may be of any length,
    spectrograms are of the length that the config says. The batch is dynamic. A model that compares pictures with texts
    has input_ids and, where it takes one, attention_mask [texts, tokens] beside pictures. The weights are in memory as
    a whole.

    Raises:
        CaptureError: it reads something else, torch.export cannot follow it, or the checkpoint does not fit its config.
    """
    loaded = load_whole(folder, head.loader)
    model, name = loaded.model, str(loaded.model.main_input_name)
    both = compares(folder.config)
    read = _reading(model, _PICTURES if both else name, folder)
    random = torch.Generator().manual_seed(0)
    calls, axes = [], {_PICTURES if both else name: _free(read.dims)}
    for rows in (read.example[0], _BATCH + 1):
        calls.append({name: torch.randn(rows, *read.example[1:], generator=random) for name in axes})
    texts, tokens = (_texts(model), int(folder.config.get_text_config().vocab_size)) if both else ([], 0)
    for call, sizes in zip(calls, _TEXTS, strict=True):
        drawn = {name: torch.ones(sizes, dtype=torch.int64) for name in texts}
        call |= drawn | {IDS: torch.randint(tokens, sizes, generator=random)} if both else {}
    if both:
        axes = {_PICTURES: {0: COUNT}, **{name: {0: "num_texts", 1: "sequence_length"} for name in texts}}
    captured = capture_module(model, {name: calls[0][name] for name in [*texts, *axes]}, axes)
    known = {"vocab_size": tokens} if both else {}
    return replace(
        captured, folder=folder, notes=[*loaded.notes, read.note], left_out=loaded.left_out,
        settings=captured.settings | known | {"task": head.task, "decides": decision_of(head, folder.config)},
        witness=EncoderWitness(folder, head.loader, model, frozenset(), calls),
    )  # fmt: skip


def _free(dims: Sequence[int | str]) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(dims) if isinstance(dim, str)}


def _texts(model: PreTrainedModel) -> list[str]:
    """Inputs of a model that compares pictures with texts, but for pictures."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in (IDS, "attention_mask") if name in taken]


def _reading(model: PreTrainedModel, name: str, folder: ModelFolder) -> Reading:
    config = folder.config
    if name == _PICTURES:
        return _pictures(config, read_json(folder.path / PROCESSOR) if (folder.path / PROCESSOR).is_file() else {})
    bins, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    positions = getattr(config, "max_source_positions", None)
    if name == "input_values" and bins and longest and hasattr(config, "frequency_stride"):
        return _fixed(longest, bins)
    if name == "input_features" and bins and positions and not hasattr(config, "feature_projection_input_dim"):
        return _fixed(bins, 2 * positions)
    note, second = "rows of a batch are of one length: the file has no attention_mask", (_BATCH, _SECOND)
    if name == "input_values" and hasattr(config, "conv_stride"):
        return Reading((BATCH, "sequence_length"), second, f"{note}; it reads sound as its extractor makes it")
    if name == "input_features" and (width := getattr(config, "feature_projection_input_dim", None)):
        return Reading((BATCH, "sequence_length", width), (_BATCH, 50, width), note)
    if name == "input_features" and (width := getattr(getattr(config, "encoder_config", None), "num_mel_bins", None)):
        return Reading((BATCH, "sequence_length", width), (_BATCH, _FRAMES, width), note)
    raise CaptureError(
        f"reads {name}, whose sizes are not known for {type(model).__name__}", place=folder.name,
        remedy="Pass it as an nn.Module with example inputs",
    )  # fmt: skip


def _fixed(*sizes: int) -> Reading:
    return Reading((BATCH, *sizes), (_BATCH, *sizes), f"reads spectrograms of {' x '.join(map(str, sizes))}")


def _pictures(config: PretrainedConfig, processor: Mapping[str, Any]) -> Reading:
    config = getattr(config, "vision_config", config)  # of one that reads texts too, or is half of such a model
    channels, frames = int(getattr(config, "num_channels", 3)), getattr(config, "num_frames", None)
    height, width = _side(processor, config)
    sizes = (*([int(frames)] if frames else []), channels, height, width)
    films = f"films of {frames} pictures" if frames else "pictures"
    return Reading((BATCH, *sizes), (_BATCH, *sizes), f"reads {films} of {height} x {width} pixels")


def _side(processor: Mapping[str, Any], config: PretrainedConfig) -> tuple[int, int]:
    """Height and width: cropped to, else resized to, else what the config says."""
    cropped = processor.get("do_center_crop", True)
    stated = [processor.get("crop_size") if cropped else None, processor.get("size")]
    for size in (*stated, getattr(config, "image_size", None), _SIDE):
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
        if isinstance(size, Mapping) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise AssertionError
