"""Encoders that read the patches of pictures of any size, one behind another, and how many of them each has."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel

from ...artifact.picture_positions import picture_positions
from .base import COUNT, Pictures, VisionLanguage

GRID = "image_grid_thw"


@dataclass(frozen=True)
class Places:
    """Where patches are, int64 [patches] each.

    Attributes:
        frame: number of the picture, or of the frame of a film.
        row, column: in it; height, width: of it.
    """

    frame: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def places_of(grid: Tensor, count: int, merged: int) -> Places:
    """Places of patches that come in squares of `merged` by `merged`, computed without a size that depends on values.

    Args:
        grid: int64 [pictures, 3], patches of each in time, height and width.
        count: patches of all.
    """
    time, height, width = grid[:, 0].clamp(min=1), grid[:, 1].clamp(min=merged), grid[:, 2].clamp(min=merged)
    ends = (time * height * width).cumsum(0)
    patch = torch.arange(count)
    picture = (patch[:, None] >= ends[None, :]).sum(1)
    # Behind the last picture there is nothing, unless the sizes do not fit the patches.
    picture = picture.clamp(max=grid.shape[0] - 1)
    height, width = height[picture], width[picture]
    before = ends[picture] - (time[picture] * height * width)
    local, area = patch - before, height * width
    inside, band = local % area, merged * width
    square = inside % band
    row = inside // band * merged + square % (merged * merged) // merged
    column = square // (merged * merged) * merged + square % merged
    # Frames of all pictures are counted together: a frame begins where the number of patches in front is its own.
    return Places(before + local // area, row, column, height, width)


def alike(*numbers: Tensor) -> Tensor:
    """Which patches see each other: those that agree in all numbers [patches]; bool [1, 1, patches, patches]."""
    pairs = [number[:, None] == number[None, :] for number in numbers]
    seen = pairs[0]
    for pair in pairs[1:]:
        seen = seen & pair
    return seen[None, None]


def attend(attention: Any, x: Tensor, turned: tuple[Tensor, Tensor], seen: Tensor, rotate: Any) -> Tensor:
    """Attention of patches [patches, features] with one linear for q, k and v.

    Args:
        turned: cosines and sines; rotate: applies them, as transformers does.
        seen: see `alike`.
    """
    heads = attention.num_heads
    query, key, value = attention.qkv(x).reshape(x.shape[0], 3, heads, -1).unbind(1)
    query, key = rotate(query, key, *turned)
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=attention.scaling)
    return attention.proj(out[0].transpose(0, 1).reshape(x.shape[0], -1))


class GridPictures(VisionLanguage):
    """An architecture whose encoder reads patches [patches, numbers] and grids [pictures, 3]."""

    positions = (3, "batch_size", "sequence_length")

    def merged(self, config: PretrainedConfig) -> int:
        """Patches that one row of features holds, along each side."""
        return int(config.vision_config.spatial_merge_size)

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        vision = config.vision_config
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": Pictures(("num_patches", numbers)), GRID: Pictures((COUNT, 3), torch.int64)
        }  # fmt: skip

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        merged, numbers = self.merged(config), int(self.inputs(config)["pixel_values"].dims[1])
        grid = torch.tensor([[1, merged * (2 + i % 2), merged * (3 - i % 2)] for i in range(count)])
        return {"pixel_values": torch.randn(int(grid.prod(1).sum()), numbers, generator=generator), GRID: grid}

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        return [int(patches) // self.merged(config) ** 2 for patches in pictures[GRID].prod(1)]

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == self.token(config)).int()}

    def places(self, config: PretrainedConfig, ids: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        grids = pictures[GRID].tolist() if GRID in pictures else []
        found = picture_positions(ids.numpy(), self.token(config), grids, self.merged(config))
        return torch.from_numpy(found)

    def placeholder(self, config: PretrainedConfig, rows: int) -> list[int]:
        around = (getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end"))
        first, last = ([token] if isinstance(token, int) else [] for token in around)
        return [*first, *[self.token(config)] * rows, *last]

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"grid": GRID, "spatial_merge_size": self.merged(config)}

    @abstractmethod
    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor: ...
