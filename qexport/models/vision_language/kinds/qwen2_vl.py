"""Qwen2-VL: patches of pictures of any size, all of a frame seeing each other."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from ..base import architecture
from ..grids import GRID, GridPictures, alike, attend, places_of


@architecture
class Qwen2VL(GridPictures):
    """Qwen2-VL."""

    types = ("qwen2_vl",)
    genai = "qwen2_5_vl"  # which differs in the encoder alone, and that is a file

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        encoder, patches = model.model.visual, pictures["pixel_values"]
        at = places_of(pictures[GRID], patches.shape[0], self.merged(model.config))
        x = encoder.patch_embed(patches)
        turned = encoder.rotary_pos_emb(x, torch.stack([at.row, at.column], dim=-1))
        seen = alike(at.frame)
        for block in encoder.blocks:
            x = x + attend(block.attn, block.norm1(x), turned, seen, apply_rotary_pos_emb_vision)
            x = x + block.mlp(block.norm2(x))
        return encoder.merger(x)
