"""Capturing what reads a text whole and says something of it: encoders, and decoders with a head other than text.

BERT and its like, and reward models, rerankers and embedding models made of decoders.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..errors import CaptureError
from ..models.checkpoint import StateDict
from ..models.heads import HIDDEN_STATES, Head, decision_of, note_on_bare
from ..models.loading import Loaded, load_known
from ..models.pooling import Pooled
from ..models.source import ModelFolder
from ..models.tokens import embedding_rows, tokens_without_rows
from ..models.transformers_witness.encoder import EncoderWitness
from ..models.transformers_witness.running import random_tokens
from .graph import BATCH, CapturedModel
from .languages import one_language
from .module import capture_module
from .streamed import Streamed, StreamedWeights, open_streamed
from .windowed_attention import windows_as_masks

# Sizes of the example inputs, see `trace`; and of the texts that the witness reads.
_BATCH, _SEQUENCE = 2, 7
_READ = ((2, 16), (3, 7))
_ALIKE = "reads no attention_mask, so the rows of a batch are texts of one length: padding changes what it says of them"
_CHOICES = 3  # texts of which one is chosen


def capture_encoder(folder: ModelFolder, head: Head) -> CapturedModel:
    """Capture the encoder of a folder, or a decoder that keeps no cache, with a head.

    The inputs are input_ids, attention_mask where the model reads one and, where it tells segments apart,
    token_type_ids, [batch, sequence] or, where one of several texts is chosen, [batch, choices, sequence]; in the
    attention_mask of models with global attention (Longformer) such tokens are 2. The outputs are those of
    transformers' class: logits and the like, or last_hidden_state and, where there are weights for it, pooler_output,
    and sentence_embedding where the folder says how that is made. A decoder that classifies texts does so by the last
    token that is not its config's pad_token_id, on whichever side that stands. All but hidden sizes are dynamic. The
    weights of a large model stay in its checkpoint; those of a small one, or of one whose graph computes with weights
    alone, are in memory as a whole.

    Raises:
        CaptureError: torch.export cannot follow the model, or the checkpoint does not fit its config.
    """
    beside = isinstance(head.loader, Pooled) and head.loader.pooling.dense  # weights that are in no checkpoint
    streamed = None if beside else open_streamed(folder, head.loader)
    if streamed is not None:
        if head.optional and streamed.absent:
            return _without_head(folder, head, streamed.absent)
        captured = _captured(streamed, folder, head)
        held = {n: b.detach() for n, b in streamed.model.named_buffers(remove_duplicate=False)} | _made(captured)
        if not any(isinstance(tensor, FakeTensor) for tensor in held.values()):
            return replace(captured, weights=StreamedWeights(streamed.checkpoint, held))
    loaded = load_known(folder, head.loader)
    if head.optional and loaded.absent:
        return _without_head(folder, head, loaded.absent)
    return _captured(loaded, folder, head)


def _without_head(folder: ModelFolder, head: Head, absent: Sequence[str]) -> CapturedModel:
    captured = capture_encoder(folder, HIDDEN_STATES)
    note = f"has no {absent[0]}, so it gives hidden states without the head ({head.task}) that its config names"
    return replace(captured, notes=[note, *captured.notes])


def _made(captured: CapturedModel) -> dict[str, torch.Tensor]:
    """Weights that the graph has and the model has not: computed of others when it was captured."""
    return captured.weights.made if isinstance(captured.weights, StateDict) else {}


def _captured(loaded: Loaded | Streamed, folder: ModelFolder, head: Head) -> CapturedModel:
    config, model, absent = folder.config, loaded.model, loaded.absent
    fake = loaded.fake if isinstance(loaded, Streamed) else None
    _check_padding(model, folder)
    model.config.use_cache = False
    taken = inspect.signature(model.forward).parameters
    if "bbox" in taken:
        raise CaptureError(
            "reads where words stand on a page (bbox) beside them", place=folder.name,
            remedy="Pass it as an nn.Module with example inputs, bbox among them",
        )  # fmt: skip
    names = [name for name in ("input_ids", "attention_mask") if name in taken]
    alike = [] if "attention_mask" in names else [_ALIKE]
    if "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    choices = head.task == "multiple-choice"
    axes = {name: {0: BATCH, 1: "sequence_length"} for name in names}
    if choices:
        axes = {name: {0: BATCH, 1: "num_choices", 2: "sequence_length"} for name in names}
    example = {n: torch.ones(_BATCH, *[_CHOICES] * choices, _SEQUENCE, dtype=torch.int64) for n in names}
    with windows_as_masks(model), one_language(model, folder.name) as one:
        captured = capture_module(model, example, axes, absent=absent, fake=fake)
    longest = _longest(model)
    sizes = {
        **({"max_position_embeddings": longest} if longest else {}),
        "hidden_size": config.hidden_size, "vocab_size": embedding_rows(model),
        "task": head.task, "decides": decision_of(head, config),
    }  # fmt: skip
    bare = note_on_bare(config) if head is HIDDEN_STATES else []
    notes = [*loaded.notes, *one, *alike, *bare, *tokens_without_rows(folder.tokenizer(), sizes["vocab_size"])]
    read = [_text_inputs(model, shape if not choices else (1, *shape), names) for shape in _READ]
    return replace(
        captured, kind="encoder", folder=folder, settings=captured.settings | sizes, notes=notes,
        left_out=loaded.left_out,
        witness=EncoderWitness(folder, head.loader, model if fake is None else None, frozenset(absent), read),
    )  # fmt: skip


def _text_inputs(model: PreTrainedModel, shape: Sequence[int], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Random tokens without padding, of two segments."""
    ids = random_tokens(model, shape)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
    return {name: feeds[name] for name in names}


def _check_padding(model: PreTrainedModel, folder: ModelFolder) -> None:
    """A decoder scores a text by its last token, and knows padding by its id alone."""
    scores = type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "score")
    if scores and model.config.get_text_config().pad_token_id is None:
        raise CaptureError(
            "scores the last token of a text, but its config has no pad_token_id to tell that from padding",
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
