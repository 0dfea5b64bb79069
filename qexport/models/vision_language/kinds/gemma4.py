"""Gemma 4 with pictures: patches of any size with their places, rows that are means of squares of them.

The decoder reads embeddings of tokens for each of its layers too, in smaller models; in larger ones the tokens of a
picture see each other in layers with windows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ....graph.ops.attention import MASKED
from ..base import COUNT, Dims, Pictures, VisionLanguage, architecture, uneven_sides
from ..ragged import behind_zeros, in_front
from ..whole_pictures import near, together

PLACES, LAYERS, TYPES = "image_position_ids", "per_layer_inputs", "mm_token_type_ids"


@architecture
class Gemma4(VisionLanguage):
    """Gemma 4. Its rows are padded with zeros behind the last."""

    types = ("gemma4",)

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        numbers = 3 * config.vision_config.patch_size**2
        return {
            "pixel_values": Pictures((COUNT, "num_patches", numbers)),
            PLACES: Pictures((COUNT, "num_patches", 2), torch.int64),
        }  # fmt: skip

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        side = config.vision_config.pooling_kernel_size
        most, numbers = 8 * side**2, 3 * config.vision_config.patch_size**2
        places = torch.full((count, most, 2), -1)
        for i, (columns, rows) in enumerate(uneven_sides(count, side).tolist()):
            place = torch.arange(columns * rows)
            places[i, : len(place)] = torch.stack([place % columns, place // columns], dim=-1)
        inside = (places >= 0).all(-1, keepdim=True)
        return {"pixel_values": torch.rand(count, most, numbers, generator=generator) * inside, PLACES: places}

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        patches = (pictures[PLACES] >= 0).all(-1).sum(1)
        return [int(number) // config.vision_config.pooling_kernel_size**2 for number in patches]

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"places": PLACES, "patches_of_a_row": config.vision_config.pooling_kernel_size}

    def placeholder(self, config: PretrainedConfig, rows: int) -> list[int]:
        around = ([token] if isinstance(token, int) else [] for token in (config.boi_token_id, config.eoi_token_id))
        first, last = around
        return [*first, *[self.token(config)] * rows, *last]

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = model.model.get_image_features(**pictures).pooler_output
        count, patches = pictures[PLACES].shape[:2]
        return behind_zeros(made, count * (patches // model.config.vision_config.pooling_kernel_size**2))

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        tower: Any = model.model.vision_tower
        at, side = pictures[PLACES], tower.config.pooling_kernel_size
        padding = (at == -1).all(-1)
        x = tower.patch_embedder(pictures["pixel_values"], at, padding)
        turned, seen = tower.encoder.rotary_emb(x, at), ~padding[:, None, None, :]
        for layer in tower.encoder.layers:
            x = layer(x, attention_mask=seen, position_embeddings=turned, position_ids=at)
        means, there = _pooled(torch.where(padding[..., None], 0.0, x), at.clamp(min=0), side)
        out = means * tower.config.hidden_size**0.5
        if tower.config.standardize:
            out = (out - tower.std_bias) * tower.std_scale
        return in_front(model.model.embed_vision(inputs_embeds=out), there)

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        text, tokens = config.get_text_config(), ("batch_size", "sequence_length")
        width = text.num_hidden_layers * (text.hidden_size_per_layer_input or 0)
        layers = {LAYERS: ((*tokens, width), torch.float32)} if width else {}
        return layers | ({TYPES: (tokens, torch.int64)} if _sees_pictures_whole(config) else {})

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        return {TYPES: (ids == self.token(config)).long()}

    def besides(self, model: PreTrainedModel, ids: Tensor, there: Tensor, rest: Tensor) -> dict[str, Tensor]:
        config, found = model.config, {}
        if LAYERS in self.others(config):
            words = torch.where(there, config.get_text_config().pad_token_id, ids)
            found[LAYERS] = model.model.language_model.get_per_layer_inputs(words, None).flatten(2)
        return found | ({TYPES: there.long()} if _sees_pictures_whole(config) else {})

    def seen_besides(self, config: PretrainedConfig, ids: Tensor, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        others = self.others(config)
        layers = {LAYERS: seen[LAYERS].flatten(2)} if LAYERS in others else {}
        return layers | {name: value for name, value in self.beside(config, ids).items() if name in others}

    def decode(self, model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
        read, text = dict(given), model.config.get_text_config()
        if LAYERS in read:
            read[LAYERS] = read[LAYERS].unflatten(-1, (text.num_hidden_layers, -1))
        types = read.pop(TYPES, None)
        if types is None:
            return model(**read)
        mask = read["attention_mask"]
        past = mask.shape[1] - types.shape[1]
        causal = torch.ops.qexport.causal_mask(mask, past, 0)
        whole = torch.where(together(types, mask), 0.0, causal)
        windowed = torch.where(near(types, past, text.sliding_window), whole, MASKED)
        masks = {"full_attention": causal, "sliding_attention": windowed}
        return model(**{**read, "attention_mask": {name: masks[name] for name in dict.fromkeys(text.layer_types)}})


def _sees_pictures_whole(config: PretrainedConfig) -> bool:
    return config.get_text_config().use_bidirectional_attention == "vision"


def _pooled(x: Tensor, at: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Means of squares of patches, and which squares there are.

    Args:
        x: [pictures, patches, features], zeros for padding.
        at: int64 [pictures, patches, 2], column and row.
        side: patches of a square along each side.

    Returns:
        [pictures, patches / side ** 2, features] and bool [pictures, patches / side ** 2].
    """
    wide = (at[..., 0].amax(-1, keepdim=True) + 1) // side
    square = at[..., 0] // side + wide * (at[..., 1] // side)
    of = (square[..., None] == torch.arange(x.shape[1] // side**2)).float()
    return (of / side**2).transpose(1, 2) @ x, of.amax(1) > 0
