"""Gemma 3 with pictures: SigLIP, rows pooled to a fixed number, a decoder in which those of a picture see each other.

That is no causal mask, so that attention is standard: ONNX Runtime's GroupQueryAttention has no other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ....graph.ops.attention import MASKED
from ..base import Dims, FixedPictures, architecture
from ..whole_pictures import near, together

TYPES = "token_type_ids"  # 1 for tokens of pictures


@architecture
class Gemma3(FixedPictures):
    """Gemma 3 from 4B on."""

    types = ("gemma3",)

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        return {TYPES: (("batch_size", "sequence_length"), torch.int64)}

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        return {TYPES: (ids == self.token(config)).long()}

    def besides(self, model: PreTrainedModel, ids: Tensor, there: Tensor, rest: Tensor) -> dict[str, Tensor]:
        return {TYPES: there.long()}

    def seen_besides(self, config: PretrainedConfig, ids: Tensor, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.beside(config, ids)

    def decode(self, model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
        read = dict(given)
        types, mask = read.pop(TYPES), read["attention_mask"]
        whole = together(types, mask)
        past, text = mask.shape[1] - types.shape[1], model.config.get_text_config()
        windows = {"full_attention": 0, "sliding_attention": text.sliding_window}
        masks = {}
        for name in dict.fromkeys(text.layer_types):
            causal = torch.ops.qexport.causal_mask(mask, past, 0)
            masks[name] = torch.where(whole, 0.0, causal)
            if windows[name]:  # within which a picture is seen too
                masks[name] = torch.where(near(types, past, windows[name]), masks[name], MASKED)
        return model(**{**read, "attention_mask": masks})
