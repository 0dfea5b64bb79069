"""Idefics3 and SmolVLM: pictures cut into tiles of one size, whose rows are joined by a linear."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base import FixedPictures, architecture


@architecture
class Idefics3(FixedPictures):
    """Idefics3 and SmolVLM. Tiles are whole: a picture padded to the size of another is not read."""

    types = ("idefics3", "smolvlm")
    decoder = "model.text_model"

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        return super().stated(model, {name: tensor[None] for name, tensor in pictures.items()})

    def given(self, pictures: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        return {name: tensor.unflatten(0, (rows, -1)) for name, tensor in pictures.items()}

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        encoder = model.model.vision_model
        tables = encoder.embeddings
        x = tables.patch_embedding(pictures["pixel_values"]).flatten(2).transpose(1, 2)
        x = x + tables.position_embedding(_places(tables.num_patches_per_side))
        x = encoder.post_layernorm(encoder.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state)
        return model.model.connector(x).flatten(0, 1)


def _places(side: int) -> Tensor:
    """Rows of the table of positions for a whole tile, by the buckets that fractions of a side fall into."""
    bounds = np.arange(1 / side, 1.0, 1 / side, dtype=np.float32)
    fractions = np.minimum(np.arange(side, dtype=np.float32) * np.float32(1.0 / side), np.float32(1 - 1e-6))
    bucket = np.searchsorted(bounds, fractions, side="right")
    return torch.tensor((bucket[:, None] * side + bucket).reshape(1, -1).tolist())
