"""Qwen2.5-VL: as Qwen2-VL, but in most layers patches see those of their window alone."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from ..base import architecture
from ..grids import GRID, GridPictures, alike, attend, places_of


@architecture
class Qwen25VL(GridPictures):
    """Qwen2.5-VL. Windows are masks here, and no patch changes its place."""

    types = ("qwen2_5_vl",)
    genai = "qwen2_5_vl"

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        encoder, patches = model.model.visual, pictures["pixel_values"]
        side = encoder.window_size // encoder.patch_size  # of a window, in patches
        at = places_of(pictures[GRID], patches.shape[0], self.merged(model.config))
        x = encoder.patch_embed(patches)
        turned = encoder.rotary_pos_emb(x, torch.stack([at.row, at.column], dim=-1))
        whole, near = alike(at.frame), alike(at.frame, at.row // side, at.column // side)
        for number, block in enumerate(encoder.blocks):
            seen = whole if number in encoder.fullatt_block_indexes else near
            x = x + attend(block.attn, block.norm1(x), turned, seen, apply_rotary_pos_emb_vision)
            x = x + block.mlp(block.norm2(x))
        return encoder.merger(x)
