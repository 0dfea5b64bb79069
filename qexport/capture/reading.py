"""Sizes of the pictures, films and sound that models read, by their configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..artifact.files import read_json
from ..errors import CaptureError
from ..models.source import ModelFolder
from .graph import BATCH

PROCESSOR = "preprocessor_config.json"
ROWS, _SIDE, _SECOND = 2, 224, 16000  # pixels where nothing says how many; numbers of a second of sound
_FRAMES = 98  # of a second in spectrograms of any length
_STACKED_BINS = "feature_projection_input_dim"
_STACKED = 50  # the same where a frame holds two


@dataclass(frozen=True)
class Reading:
    """What a model reads.

    Attributes:
        dims: of its input; a name for a dimension that is free.
        example: size of each, to trace with.
        note: a sentence on what the sizes mean for who uses the file; empty where its length is free.
    """

    dims: tuple[int | str, ...]
    example: tuple[int, ...]
    note: str = ""

    @property
    def free(self) -> bool:
        """Whether it may be of any length."""
        return "sequence_length" in self.dims


def reading_of(model: PreTrainedModel, name: str, folder: ModelFolder, config: PretrainedConfig) -> Reading:
    """What a model reads through the input of a name.

    Args:
        folder: of the model, with what its processor says.
        config: the model's, or that of the part of it which reads.

    Raises:
        CaptureError: nothing says what sizes it has.
    """
    if name == "pixel_values":
        return _pictures(config, read_json(folder.path / PROCESSOR) if (folder.path / PROCESSOR).is_file() else {})
    bins, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    positions, stacked = getattr(config, "max_source_positions", None), getattr(config, _STACKED_BINS, None)
    if name == "input_values" and bins and longest and hasattr(config, "frequency_stride"):
        return _fixed(longest, bins)
    if name == "input_features" and bins and positions and not stacked:
        return _fixed(bins, 2 * positions)  # the second of the two convolutions in front takes every other frame
    if name == "input_values" and (hasattr(config, "conv_stride") or (model.config.is_encoder_decoder and not bins)):
        return Reading((BATCH, "sequence_length"), (ROWS, _SECOND))
    width = stacked or _width(config)
    if name == "input_features" and width:
        return Reading((BATCH, "sequence_length", width), (ROWS, _STACKED if stacked else _FRAMES, width))
    raise CaptureError(
        f"reads {name}, whose sizes are not known for {type(model).__name__}", place=folder.name,
        remedy="Pass it as an nn.Module with example inputs",
    )  # fmt: skip


def _width(config: PretrainedConfig) -> int | None:
    """Numbers in a frame of a spectrogram."""
    if each := getattr(config, "input_feat_per_channel", None):
        return int(each * getattr(config, "input_channels", 1))
    return getattr(getattr(config, "encoder_config", None), "num_mel_bins", None)


def _fixed(*sizes: int) -> Reading:
    return Reading((BATCH, *sizes), (ROWS, *sizes), f"reads spectrograms of {' x '.join(map(str, sizes))}")


def _pictures(config: PretrainedConfig, processor: Mapping[str, Any]) -> Reading:
    config = getattr(config, "vision_config", config)  # of one that reads texts too, or is half of such a model
    channels, frames = int(getattr(config, "num_channels", 3)), getattr(config, "num_frames", None)
    height, width = _side(processor, config)
    sizes = (*([int(frames)] if frames else []), channels, height, width)
    films = f"films of {frames} pictures" if frames else "pictures"
    return Reading((BATCH, *sizes), (ROWS, *sizes), f"reads {films} of {height} x {width} pixels")


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
