"""Qwen3-VL: as Qwen2-VL, with learned places between which it interpolates, and features for the first layers too."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from ..base import Dims, architecture
from ..grids import GRID, GridPictures, Places, alike, attend, places_of

DEEP = "deepstack_embeds"  # what is added behind the first layers, one after another (DeepStack, arXiv 2406.04334)


@architecture
class Qwen3VL(GridPictures):
    """Qwen3-VL, with and without experts in the decoder."""

    types = ("qwen3_vl", "qwen3_vl_moe")

    def deep_layers(self, config: PretrainedConfig) -> list[int]:
        """Blocks of the encoder whose features are for the first layers of the decoder."""
        return list(config.vision_config.deepstack_visual_indexes)

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = model.model.get_image_features(**pictures)
        deep = made.deepstack_features if self.deep_layers(model.config) else ()
        return torch.cat([torch.cat(list(part)) for part in (made.pooler_output, *deep)], dim=-1)

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        encoder, patches = model.model.visual, pictures["pixel_values"]
        at = places_of(pictures[GRID], patches.shape[0], self.merged(model.config))
        x = encoder.patch_embed(patches) + _learned(encoder, at)
        turned, seen = encoder.rotary_pos_emb(x, torch.stack([at.row, at.column], dim=-1)), alike(at.frame)
        deep: list[Tensor] = []
        for number, block in enumerate(encoder.blocks):
            x = x + attend(block.attn, block.norm1(x), turned, seen, apply_rotary_pos_emb_vision)
            x = x + block.mlp(block.norm2(x))
            if number in self.deep_layers(model.config):
                deep.append(encoder.deepstack_merger_list[len(deep)](x))
        return torch.cat([encoder.merger(x), *deep], dim=-1)

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        layers = len(self.deep_layers(config))
        width = layers * config.get_text_config().hidden_size
        return {DEEP: (("batch_size", "sequence_length", width), torch.float32)} if layers else {}

    def besides(self, model: PreTrainedModel, ids: Tensor, there: Tensor, rest: Tensor) -> dict[str, Tensor]:
        return {DEEP: rest * there[..., None]} if self.others(model.config) else {}

    def seen_besides(self, config: PretrainedConfig, ids: Tensor, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        if not self.others(config):
            return {}
        width = self.others(config)[DEEP][0][-1]
        found, layers = torch.zeros(*ids.shape, int(width)), seen.get("deepstack_visual_embeds")
        if layers is not None:
            found[ids == self.token(config)] = torch.cat(list(layers), dim=-1)
        return {DEEP: found}

    def decode(self, model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
        if DEEP not in given:
            return model(**given)
        read = dict(given)
        added = read.pop(DEEP).split(model.config.get_text_config().hidden_size, dim=-1)
        layers = model.model.language_model
        layers._deepstack_process = lambda hidden, mask, features: hidden + features
        try:
            made = layers(**read, deepstack_visual_embeds=added)
        finally:
            del layers._deepstack_process
        made.logits = model.lm_head(made.last_hidden_state)
        return made


def _learned(encoder: Any, at: Places) -> Tensor:
    """Rows of the square table of places, between the four next to each patch, corners on corners."""
    side = encoder.num_grid_per_side
    corners, shares = [], []
    for place, size in ((at.row, at.height), (at.column, at.width)):
        exact = place * ((side - 1) / (size - 1).clamp(min=1))
        low = exact.floor().clamp(max=side - 1)
        corners.append((low.long(), (low.long() + 1).clamp(max=side - 1)))
        shares.append((1 - (exact - low), exact - low))
    found = torch.zeros(())
    for rows, down in zip(corners[0], shares[0], strict=True):
        for columns, right in zip(corners[1], shares[1], strict=True):
            found = found + encoder.pos_embed(rows * side + columns) * (down * right)[:, None]
    return found
