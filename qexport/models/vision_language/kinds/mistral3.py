"""Mistral 3 and LightOn OCR: pictures of any size side by side, padded to the largest, rows joined by fours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..base import COUNT, Pictures, VisionLanguage, architecture, uneven_sides
from ..ragged import behind_zeros, in_front

SIZES = "image_sizes"  # height and width of each in pixels


@architecture
class Mistral3(VisionLanguage):
    """Those with Pixtral's encoder. Its rows are padded with zeros behind the last."""

    types = ("mistral3", "lighton_ocr")

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        channels = config.vision_config.num_channels
        return {
            "pixel_values": Pictures((COUNT, channels, "height", "width")), SIZES: Pictures((COUNT, 2), torch.int64)
        }  # fmt: skip

    def _step(self, config: PretrainedConfig) -> int:
        """Pixels that one row of features stands for, along each side."""
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        sizes = uneven_sides(count, self._step(config))
        height, width = sizes.amax(0).tolist()
        pixels = torch.randn(count, config.vision_config.num_channels, height, width, generator=generator)
        inside = (torch.arange(height)[:, None] < sizes[:, :1, None]) & (torch.arange(width) < sizes[:, 1:, None])
        return {"pixel_values": pixels * inside[:, None], SIZES: sizes}

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        return [int(number) for number in (pictures[SIZES] // self._step(config)).prod(1)]

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"sizes": SIZES, "pixels_of_a_row": self._step(config)}

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = model.model.get_image_features(**pictures).pooler_output
        count, _, *sides = pictures["pixel_values"].shape
        height, width = (side // self._step(model.config) for side in sides)
        return behind_zeros(made, count * height * width)

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        encoder, projector = _parts(model)
        x = encoder.patch_conv(pictures["pixel_values"])
        count, _, height, width = x.shape
        down, right = torch.arange(height), torch.arange(width)
        places = torch.stack([down[:, None].expand(-1, width), right.expand(height, -1)], dim=-1).flatten(0, 1)
        inside = _inside(down, right, pictures[SIZES] // encoder.patch_size)
        x = encoder.ln_pre(x.flatten(2).transpose(1, 2))
        turned = encoder.patch_positional_embedding(x, places)
        states = [x]
        for layer in encoder.transformer.layers:
            states.append(layer(states[-1], inside[:, None, None, :], position_embeddings=turned))
        chosen = getattr(model.config, "vision_feature_layer", -1)
        read = torch.cat([states[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)
        grid = projector.norm(read).unflatten(1, (height, width))
        side = model.config.spatial_merge_size
        joined = _joined(grid, side)
        out = projector.linear_2(projector.act(projector.linear_1(projector.patch_merger.merging_layer(joined))))
        sizes = pictures[SIZES] // self._step(model.config)
        there = _inside(torch.arange(height // side), torch.arange(width // side), sizes)
        return in_front(out, there.expand(count, -1))


def _parts(model: PreTrainedModel) -> tuple[Any, Any]:
    """The encoder and the projector, which are called otherwise in some."""
    inner: Any = model.model
    if hasattr(inner, "vision_encoder"):
        return inner.vision_encoder, inner.vision_projection
    return inner.vision_tower, inner.multi_modal_projector


def _inside(down: Tensor, right: Tensor, sizes: Tensor) -> Tensor:
    """Which places of a grid are of each picture; bool [pictures, places].

    Args:
        down, right: int64 [height] and [width].
        sizes: of each picture [pictures, 2].
    """
    return ((down < sizes[:, :1])[:, :, None] & (right < sizes[:, 1:])[:, None, :]).flatten(1)


def _joined(grid: Tensor, side: int) -> Tensor:
    """Squares of rows [pictures, height, width, features] as one row each [pictures, squares, features * side ** 2]."""
    height, width = grid.shape[1] // side, grid.shape[2] // side
    parts = [grid[:, i::side, j::side][:, :height, :width] for i in range(side) for j in range(side)]
    return torch.stack(parts, dim=-1).flatten(1, 2).flatten(2)
