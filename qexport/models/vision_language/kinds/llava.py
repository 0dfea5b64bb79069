"""LLaVA: a CLIP or SigLIP encoder, two linears that project one of its layers, and any decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base import FixedPictures, architecture


@architecture
class Llava(FixedPictures):
    """LLaVA 1.5 and those made like it."""

    types = ("llava",)

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        config = model.config
        made = model.model.vision_tower(**pictures, output_hidden_states=True, return_dict=True)
        chosen, first = config.vision_feature_layer, int(config.vision_feature_select_strategy == "default")
        layers = [chosen] if isinstance(chosen, int) else chosen
        # Without the row of the class, which stands first.
        read = torch.cat([made.hidden_states[layer][:, first:] for layer in layers], dim=-1)
        return model.model.multi_modal_projector(read).flatten(0, 1)
