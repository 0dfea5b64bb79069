"""PaliGemma: SigLIP, one linear, and Gemma or Gemma 2, which reads pictures and prompt in both directions.

What it writes is causal. That is no causal mask, so that attention is standard; which tokens are written is no property
of the tokens, so that whoever runs the decoder says it. Its positions begin at 1 in transformers; rotary embeddings
know differences alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base import Dims, FixedPictures, architecture

TYPES = "token_type_ids"  # 0 for pictures and prompt, 1 for what is written


@architecture
class PaliGemma(FixedPictures):
    """PaliGemma and PaliGemma 2."""

    types = ("paligemma",)

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        return {TYPES: (("batch_size", "sequence_length"), torch.int64)}

    def told(self, config: PretrainedConfig, written: Tensor) -> dict[str, Tensor]:
        return {TYPES: written.long()}

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        return self.told(config, self.written(config, ids))

    def seen_besides(self, config: PretrainedConfig, ids: Tensor, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.beside(config, ids)

    def written(self, config: PretrainedConfig, ids: Tensor, made: Mapping[str, Any] | None = None) -> Tensor:
        if made is not None and TYPES in made:
            return torch.as_tensor(made[TYPES]).reshape(ids.shape) != 0
        return super().written(config, ids)

    def texts(self, text: str, stand: str) -> dict[str, list[str]]:
        """The first line is the prompt, and what stands behind it is written; of one line, all is."""
        behind = text.rfind(stand) + len(stand)
        prompt, broken, answer = text[behind:].partition("\n")
        if not broken:
            prompt, answer = "", prompt
        return {"text": [text[:behind] + prompt], "suffix": [answer]}

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"prefix": TYPES}

    def decode(self, model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
        # Past the middle of the model, which makes one mask for layers with and without a window of a prepared one.
        read = dict(given)
        types, mask = read.pop(TYPES), read.pop("attention_mask")
        text, past = model.config.get_text_config(), mask.shape[1] - types.shape[1]
        together = prefix_pairs(types, mask)
        kinds = getattr(text, "layer_types", None)
        windows = {kind: text.sliding_window if kind == "sliding_attention" else 0 for kind in kinds or ("",)}
        masks = {
            kind: torch.where(together, 0.0, torch.ops.qexport.causal_mask(mask, past, window))
            for kind, window in windows.items()
        }
        made = model.model.language_model(attention_mask=masks if kinds else masks[""], **read)
        logits, cap = model.lm_head(made.last_hidden_state), getattr(text, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return CausalLMOutputWithPast(logits=logits, past_key_values=made.past_key_values)


def prefix_pairs(types: Tensor, mask: Tensor) -> Tensor:
    """Which keys a new token sees because both belong to the prefix, however far apart they are.

    Args:
        types: int64 [batch, sequence], 0 for new tokens of the prefix, which is read in one call.
        mask: int64 [batch, past + sequence], 0 for padding.

    Returns:
        bool [batch, 1, sequence, past + sequence].
    """
    prefix = types == 0
    pairs = prefix[:, :, None] & prefix[:, None, :]
    return (pad(pairs, (mask.shape[1] - types.shape[1], 0)) & mask.bool()[:, None, :])[:, None]
