"""Encoders that read the patches of pictures of any size, one behind another, and how many of them each has."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...artifact.picture_positions import picture_positions
from .base import COUNT, Pictures, VisionLanguage, uneven_sides

GRID = "image_grid_thw"


@dataclass(frozen=True)
class Places:
    """Where patches are, int64 [patches] each.

    Attributes:
        frame: the first patch of the picture, or of the frame of a film.
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
    return Places(before + local // area * area, row, column, height, width)


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


def told(encoder: Any, grid: Tensor, at: Places) -> dict[str, Any]:
    """What an encoder of transformers would make of sizes in ways that depend on values, by its arguments' names.

    Args:
        grid: int64 [pictures, 3], patches of each in time, height and width.
    """
    ends, count = grid.prod(1).cumsum(0), at.row.shape[0]
    # Patches that no size counts are of the last picture, so that no index leaves its table.
    last = torch.arange(grid.shape[0]) == grid.shape[0] - 1
    ends = torch.where(last, ends.clamp(min=count), ends)
    found: dict[str, Any] = {
        "position_ids": torch.stack([at.row, at.column], dim=-1), "cu_seqlens": pad(ends, (1, 0)),
        "max_seqlen": 1,  # which is not read
    }  # fmt: skip
    side = getattr(encoder, "num_grid_per_side", None)
    if side is not None:  # of a square table of places, between which it interpolates
        found["interp_indices"], found["interp_weights"] = between(encoder, at)
    return found


def between(table: Any, at: Places) -> tuple[Tensor, Tensor]:
    """Rows of a square table of places next to each patch [patches, 4], and the shares in which they are mixed.

    Args:
        table: says how long its sides are, and whether corners lie on corners.
    """
    side, corners = table.num_grid_per_side, table.interpolation_align_corners
    places, shares = [], []
    for place, size in ((at.row, at.height), (at.column, at.width)):
        exact = place * ((side - 1) / (size - 1).clamp(min=1)) if corners else (place + 0.5) * side / size - 0.5
        low = exact.floor()
        places.append(torch.stack([low, low + 1], dim=1).clamp(0, side - 1).long())
        shares.append(torch.stack([1 - (exact - low), exact - low], dim=1))
    rows = (places[0][:, :, None] * side + places[1][:, None, :]).flatten(1)
    return rows, (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1)


_PACKED = "qexport_packed_flash"  # transformers hands packed texts to attention whose name says flash


def _packed(
    seen: Tensor, _module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **_lengths: Any
) -> tuple[Tensor, None]:
    """Attention of patches [1, heads, patches, features], those of several pictures one behind another."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling).transpose(1, 2), None


@contextmanager
def packed_attention(encoder: Any, at: Places) -> Iterator[None]:
    """Have an encoder of transformers attend within frames by one mask, and not frame by frame."""
    configs = {id(part.config): part.config for part in encoder.modules() if hasattr(part, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    ALL_ATTENTION_FUNCTIONS[_PACKED] = partial(_packed, alike(at.frame))
    for config in configs:
        config._attn_implementation = _PACKED
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_PACKED]
        for config, name in before:
            config._attn_implementation = name


class GridPictures(VisionLanguage):
    """An architecture whose encoder reads patches [patches, numbers] and grids [pictures, 3].

    Its features are those of transformers' own encoder, unless the architecture says otherwise.

    Attributes:
        marks: what configs call the tokens around a picture.
    """

    positions = (3, "batch_size", "sequence_length")
    marks: ClassVar[str] = "vision"

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
        grid, numbers = self.grids(config, count), int(self.inputs(config)["pixel_values"].dims[1])
        return {"pixel_values": torch.randn(int(grid.prod(1).sum()), numbers, generator=generator), GRID: grid}

    def grids(self, config: PretrainedConfig, count: int) -> Tensor:
        """Of so many pictures of different sides, with as many patches each; int64 [pictures, 3]."""
        return pad(uneven_sides(count, self.merged(config)), (1, 0), value=1)

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        return [int(patches) // self.merged(config) ** 2 for patches in pictures[GRID].prod(1)]

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == self.token(config)).int()}

    def places(self, config: PretrainedConfig, ids: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        grids = pictures[GRID].tolist() if GRID in pictures else []
        found = picture_positions(ids.numpy(), self.token(config), grids, self.merged(config))
        return torch.from_numpy(found)

    def placeholder(self, config: PretrainedConfig, rows: int) -> list[int]:
        around = (getattr(config, f"{self.marks}_{end}_token_id", None) for end in ("start", "end"))
        first, last = ([token] if isinstance(token, int) else [] for token in around)
        return [*first, *[self.token(config)] * rows, *last]

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"grid": GRID, "spatial_merge_size": self.merged(config)}

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        return self.encoded(model, pictures).pooler_output

    def encoded(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Any:
        """What transformers' own encoder makes of pictures, without a size that depends on values."""
        encoder, grid = model.model.visual, pictures[GRID]
        at = places_of(grid, pictures["pixel_values"].shape[0], self.merged(model.config))
        with packed_attention(encoder, at):
            return encoder(pictures["pixel_values"], grid_thw=grid, **told(encoder, grid, at))
