"""LFM2-VL: patches of tiles of any shape, places between which it interpolates, rows joined by fours, LFM2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..base import COUNT, Pictures, VisionLanguage, architecture, uneven_sides
from ..ragged import behind_zeros, in_front

SHAPES, MASK = "spatial_shapes", "pixel_attention_mask"  # patches in height and width; which are no padding


@architecture
class LFM2VL(VisionLanguage):
    """LFM2-VL. Its rows are padded with zeros behind the last."""

    types = ("lfm2_vl",)

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        vision = config.vision_config
        numbers = vision.num_channels * vision.patch_size**2
        return {
            "pixel_values": Pictures((COUNT, "num_patches", numbers)), SHAPES: Pictures((COUNT, 2), torch.int64),
            MASK: Pictures((COUNT, "num_patches"), torch.int64),
        }  # fmt: skip

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        side, numbers = config.downsample_factor, int(self.inputs(config)["pixel_values"].dims[-1])
        shapes, patches = uneven_sides(count, side), 8 * side**2
        inside = torch.arange(patches) < shapes.prod(1, keepdim=True)
        pixels = torch.randn(count, patches, numbers, generator=generator) * inside[..., None]
        return {"pixel_values": pixels, SHAPES: shapes, MASK: inside.long()}

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        return [int(number) for number in (pictures[SHAPES] // config.downsample_factor).prod(1)]

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"shapes": SHAPES, "patches_of_a_row": config.downsample_factor}

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = model.model.get_image_features(**pictures).pooler_output
        count, patches = pictures[MASK].shape
        return behind_zeros(made, count * (patches // model.config.downsample_factor**2))

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        inner: Any = model.model
        tower, projector, shapes = inner.vision_tower, inner.multi_modal_projector, pictures[SHAPES]
        x = tower.embeddings.patch_embedding(pictures["pixel_values"])
        count, patches, _ = x.shape
        x = x + _places(tower.embeddings, shapes.clamp(min=1), patches)
        for layer in tower.encoder.layers:
            x = layer(x, pictures[MASK][:, None, None, :].bool())
        x, side = tower.post_layernorm(x), projector.factor
        order, there = _squares(shapes, patches, side)
        joined = x.flatten(0, 1)[order].reshape(count, patches // side**2, -1)
        if projector.use_layer_norm:
            joined = projector.layer_norm(joined)
        return in_front(projector.linear_2(projector.act(projector.linear_1(joined))), there)


def _places(embeddings: Any, shapes: Tensor, patches: int) -> Tensor:
    """What a square table of places is for each patch: interpolated, and smoothed where a tile has fewer patches.

    Args:
        shapes: int64 [tiles, 2], at least 1.

    Returns:
        [tiles, patches, features]; anything for padding.
    """
    side, patch = embeddings.position_embedding_size, torch.arange(patches)
    width = shapes[:, 1:]
    shares = []
    for place, size in ((patch // width, shapes[:, :1]), (patch % width, width)):
        step = side / size  # of the table for one patch
        far = ((place + 0.5) * step)[..., None] - (torch.arange(side) + 0.5)
        share = (1 - far.abs() / step.clamp(min=1)[..., None]).clamp(min=0)
        shares.append(share / share.sum(-1, keepdim=True).clamp(min=1e-6))
    rows, columns = shares
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2) @ embeddings.position_embedding.weight


def _squares(shapes: Tensor, patches: int, side: int) -> tuple[Tensor, Tensor]:
    """The patches of all squares, one after another, among those of all tiles; and which squares a tile has.

    Returns:
        int64 [tiles * patches] and bool [tiles, patches / side ** 2].
    """
    count, (high, wide) = shapes.shape[0], (shapes // side).unbind(1)
    square, wide = torch.arange(patches // side**2), wide.clamp(min=1)[:, None]
    row, column = (square // wide)[..., None, None] * side, (square % wide)[..., None, None] * side
    inside = torch.arange(side)
    place = (row + inside[:, None]) * shapes[:, 1][:, None, None, None] + column + inside
    first = (torch.arange(count) * patches)[:, None]
    order = place.flatten(1).clamp(min=0, max=patches - 1) + first
    return order.flatten(), square < high[:, None] * wide
