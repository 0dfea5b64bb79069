"""Rows of a model's embedding, and tokens of a tokenizer for which there is none."""

from typing import Any

import torch
from transformers import PreTrainedModel


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the table of token embeddings."""
    table: Any = model.get_input_embeddings()
    weight: torch.Tensor = table.weight
    return weight.shape[0]


def tokens_without_rows(tokenizer: Any, rows: int) -> list[str]:
    """A sentence on tokens whose ids are beyond the embedding, such as those that were added to the tokenizer alone.

    Args:
        tokenizer: of transformers, or None.
        rows: of the embedding.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if not beyond:
        return []
    some = ", ".join(f"{token} ({index})" for index, token in beyond[:3])
    return [
        f"the tokenizer has {len(beyond)} tokens for which the embedding of {rows} rows has none, so that texts with "
        f"them cannot be read: {some}{', ...' if len(beyond) > 3 else ''}"
    ]
