"""Qwen3-VL and Qwen3.5: as Qwen2-VL, with learned places, and features for the first layers of the decoder too."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..base import Dims, architecture
from ..grids import GridPictures

DEEP = "deepstack_embeds"  # what is added behind the first layers, one after another (DeepStack, arXiv 2406.04334)


@architecture
class Qwen3VL(GridPictures):
    """Qwen3-VL and Qwen3.5, with and without experts in the decoder; the latter has no features for first layers."""

    types = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = model.model.get_image_features(**pictures)
        return torch.cat([torch.cat(list(part)) for part in (made.pooler_output, *_deep(made))], dim=-1)

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        made = self.encoded(model, pictures)
        return torch.cat([made.pooler_output, *_deep(made)], dim=-1)

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        layers = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
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


def _deep(made: Any) -> Sequence[Any]:
    """Features for the first layers of the decoder, in what transformers' encoder returned."""
    return getattr(made, "deepstack_features", ())
