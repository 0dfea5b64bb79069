"""Capturing what reads a text whole and says something of it: encoders, and decoders with a head other than text.

BERT and its like, and reward models, rerankers and embedding models made of decoders.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModel, PreTrainedModel

from ..errors import CaptureError
from ..models.checkpoint import StateDict
from ..models.heads import note_on_bare
from ..models.loading import Loaded, load_known
from ..models.source import ModelFolder
from ..models.tokens import embedding_rows, tokens_without_rows
from ..models.transformers_witness import EncoderWitness
from .graph import BATCH, CapturedModel
from .module import capture_module
from .streamed import Streamed, StreamedWeights, open_streamed

# Sizes of the example inputs; see `trace`.
_BATCH, _SEQUENCE = 2, 7


def capture_encoder(folder: ModelFolder, loader: type[Any]) -> CapturedModel:
    """Capture the encoder of a folder, or a decoder that keeps no cache.

    The inputs are input_ids, attention_mask and, where the model tells segments apart, token_type_ids. The outputs are
    logits where the config names a model that classifies texts or tokens, start_logits and end_logits where it names
    one that answers questions, else last_hidden_state and, where there are weights for it, pooler_output: other heads
    are left out. A decoder that classifies texts does so by the last token that is not its config's pad_token_id, on
    whichever side that stands. Batch and sequence are dynamic. The weights of a large model stay in its checkpoint;
    those of a small one, or of one whose graph computes with weights alone, are in memory as a whole.

    Args:
        loader: the auto class of transformers for it, see `models.heads`.

    Raises:
        CaptureError: torch.export cannot follow the model, or the checkpoint does not fit its config.
    """
    if (streamed := open_streamed(folder, loader)) is not None:
        captured = _captured(streamed, folder, loader)
        held = {n: b.detach() for n, b in streamed.model.named_buffers(remove_duplicate=False)} | _made(captured)
        if not any(isinstance(tensor, FakeTensor) for tensor in held.values()):
            return replace(captured, weights=StreamedWeights(streamed.checkpoint, held))
    return _captured(load_known(folder, loader), folder, loader)


def _made(captured: CapturedModel) -> dict[str, torch.Tensor]:
    """Weights that the graph has and the model has not: computed of others when it was captured."""
    return captured.weights.made if isinstance(captured.weights, StateDict) else {}


def _captured(loaded: Loaded | Streamed, folder: ModelFolder, loader: type[Any]) -> CapturedModel:
    config, model, absent = folder.config, loaded.model, loaded.absent
    fake = loaded.fake if isinstance(loaded, Streamed) else None
    _check_padding(model, folder)
    model.config.use_cache = False
    names = ["input_ids", "attention_mask"]
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" not in taken:
        raise CaptureError("reads no attention_mask, so that padding changes what it says of a text", place=folder.name)
    if "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    example = {name: torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64) for name in names}
    axes = {name: {0: BATCH, 1: "sequence_length"} for name in names}
    captured = capture_module(model, example, axes, absent=absent, fake=fake)
    longest = _longest(model)
    sizes = {
        **({"max_position_embeddings": longest} if longest else {}),
        "hidden_size": config.hidden_size, "vocab_size": embedding_rows(model),
    }  # fmt: skip
    bare = note_on_bare(config) if loader is AutoModel else []
    notes = [*loaded.notes, *bare, *tokens_without_rows(folder.tokenizer(), sizes["vocab_size"])]
    return replace(
        captured, kind="encoder", folder=folder, settings=captured.settings | sizes, notes=notes,
        left_out=loaded.left_out,
        witness=EncoderWitness(folder, loader, model if fake is None else None, frozenset(absent)),
    )  # fmt: skip


def _check_padding(model: PreTrainedModel, folder: ModelFolder) -> None:
    """A decoder scores a text by its last token, and knows padding by its id alone."""
    scores = type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "score")
    if scores and model.config.get_text_config().pad_token_id is None:
        raise CaptureError(
            "scores the last token of a text, and its config has no pad_token_id to tell that from padding",
            place=folder.name, remedy="Set pad_token_id in config.json to the tokenizer's",
        )  # fmt: skip


def _longest(model: PreTrainedModel) -> int | None:
    """Tokens that the model reads at most, where it says so."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    # A table of positions with a row for padding counts from behind that row (RoBERTa and others).
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == longest]
    rows = [m.padding_idx + 1 for m in tables if m.padding_idx is not None and m is not model.get_input_embeddings()]
    return longest - max(rows, default=0)
