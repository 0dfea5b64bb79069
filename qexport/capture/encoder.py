"""Capturing a text encoder of transformers (BERT and its like) from its folder, with the head that its config names."""

import inspect
from dataclasses import replace

import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from ..errors import CaptureError
from ..models.transformers_witness import EncoderWitness
from .graph import Captured
from .loading import load_known
from .module import capture_module
from .source import ModelFolder

# Sizes of the example inputs; see `trace`.
_BATCH, _SEQUENCE = 2, 7
# Heads that are kept, by the class that loads an encoder with one.
_HEADS = {
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether transformers knows the model as one that fills in masked tokens, and its checkpoint is no decoder's."""
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    known = config.model_type in masked and not config.is_encoder_decoder
    return known and not causal.intersection(config.architectures or ()) and not getattr(config, "is_decoder", False)


def capture_encoder(folder: ModelFolder) -> Captured:
    """Capture the encoder of a folder.

    The inputs are input_ids, attention_mask and, where the model tells segments apart, token_type_ids. The outputs are
    logits where the config names a model that classifies texts or tokens, start_logits and end_logits where it names
    one that answers questions, else last_hidden_state and, where there are weights for it, pooler_output: other heads
    are left out. Batch and sequence are dynamic. The weights are in memory as a whole.

    Raises:
        CaptureError: torch.export cannot follow the model, or the checkpoint does not fit its config.
    """
    loader = _loader(folder.config)
    model, absent = load_known(folder, loader)
    config = folder.config
    names = ["input_ids", "attention_mask"]
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" not in taken:
        raise CaptureError("reads no attention_mask, so that padding changes what it says of a text", place=folder.name)
    if "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    example = {name: torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64) for name in names}
    captured = capture_module(model, example, {name: {0: "batch", 1: "sequence"} for name in names}, absent=absent)
    longest = _longest(model)
    sizes = {
        **({"max_position_embeddings": longest} if longest else {}),
        "hidden_size": config.hidden_size, "vocab_size": model.get_input_embeddings().weight.shape[0],
    }  # fmt: skip
    witness = EncoderWitness(folder, loader, model, frozenset(absent))
    return replace(captured, kind="encoder", folder=folder, settings=captured.settings | sizes, witness=witness)


def _loader(config: PretrainedConfig) -> type:
    """The class that loads what the checkpoint says it is, with its head or without one."""
    named = set(config.architectures or ())
    for loader, names in _HEADS.items():
        known = names.get(config.model_type, ())
        if named.intersection([known] if isinstance(known, str) else known):
            return loader
    return AutoModel


def _longest(model: torch.nn.Module) -> int | None:
    """Tokens that the model reads at most, where it says so."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    # A table of positions with a row for padding counts from behind that row (RoBERTa and others).
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == longest]
    rows = [m.padding_idx + 1 for m in tables if m.padding_idx is not None and m is not model.get_input_embeddings()]
    return longest - max(rows, default=0)
