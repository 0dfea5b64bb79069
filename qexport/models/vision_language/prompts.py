"""Prompts of random tokens with random pictures in them."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tokens import embedding_rows
from .base import VisionLanguage


@dataclass(frozen=True)
class Prompt:
    """Tokens and pictures.

    Attributes:
        input_ids: int64 [batch, sequence].
        pictures: what an encoder of pictures reads, by name, those of the first row first.
    """

    input_ids: Tensor
    pictures: Mapping[str, Tensor]


def random_prompt(kind: VisionLanguage, model: PreTrainedModel, rows: int, text: int, seed: int = 0) -> Prompt:
    """A picture in each of `rows` rows, and `text` tokens around it."""
    random, config = torch.Generator().manual_seed(seed), model.config
    pictures = kind.example(config, rows, random)
    counts = kind.rows(config, pictures, len(kind.stated(model, pictures)))
    made = [
        with_pictures(words, [kind.placeholder(config, count)])
        for words, count in zip(
            random_words(embedding_rows(model), kind.reserved(config), (rows, text), random), counts, strict=True
        )
    ]
    return Prompt(torch.stack(made), pictures)


def random_words(size: int, reserved: Set[int], shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Token ids below `size` that are none of those that stand for pictures."""
    words = torch.tensor([token for token in range(size) if token not in reserved])
    return words[torch.randint(0, len(words), tuple(shape), generator=random)]


def with_pictures(words: Tensor, placeholders: Sequence[Sequence[int]]) -> Tensor:
    """Tokens [sequence] with those that stand for pictures behind the first of them."""
    stand = [torch.tensor(tokens, dtype=words.dtype) for tokens in placeholders]
    return torch.cat([words[:1], *stand, words[1:]])
