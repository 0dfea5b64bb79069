"""PaddleOCR-VL: patches row by row, of which squares are joined behind the encoder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..base import COUNT, Pictures, architecture
from ..grids import GRID, GridPictures, packed_attention, places_of, told


@architecture
class PaddleOCRVL(GridPictures):
    """PaddleOCR-VL."""

    types = ("paddleocr_vl",)

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        vision = config.vision_config
        patch = (vision.num_channels, vision.patch_size, vision.patch_size)
        return {"pixel_values": Pictures(("num_patches", *patch)), GRID: Pictures((COUNT, 3), torch.int64)}

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = self.grids(config, count)
        sizes = self.inputs(config)["pixel_values"].dims[1:]
        return {"pixel_values": torch.randn(int(grid.prod(1).sum()), *map(int, sizes), generator=generator), GRID: grid}

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        inner: Any = model.model
        encoder, projector, grid = inner.visual.vision_model, inner.projector, pictures[GRID]
        patches, side = pictures["pixel_values"].shape[0], self.merged(model.config)
        by_rows, by_squares = places_of(grid, patches, 1), places_of(grid, patches, side)
        with packed_attention(encoder, by_rows):
            given = told(encoder.embeddings, grid, by_rows)
            x = encoder(pictures["pixel_values"][None], grid_thw=grid, **given).last_hidden_state
        order = by_squares.frame + by_squares.row * by_squares.width + by_squares.column
        joined = projector.pre_norm(x.flatten(0, -2)[order]).reshape(-1, side * side * x.shape[-1])
        return projector.linear_2(projector.act(projector.linear_1(joined)))
