"""Numbers about a text and about how far it is from another one; pure functions on token ids and logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

NGRAM = 4


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common before the first difference."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def prefix_share(first: Sequence[int], second: Sequence[int]) -> float:
    """`common_prefix` over the length of the longer text; 1 when the texts are equal."""
    longest = max(len(first), len(second))
    return common_prefix(first, second) / longest if longest else 1.0


def token_agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of the positions of the longer text at which both have the same token; 1 when the texts are equal."""
    longest = max(len(first), len(second))
    equal = sum(one == other for one, other in zip(first, second, strict=False))
    return equal / longest if longest else 1.0


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams (Li et al., arXiv 1510.03055); None for a text shorter than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float | None:
    """Share of n-grams that were in the text before; None for a text shorter than n tokens."""
    share = distinct(tokens, n)
    return None if share is None else 1 - share


def total_variation(reference: Tensor, logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Half the sum of |p - q| of the distributions that tokens are drawn from, float64 [tokens], 0 to 1.

    However random numbers are used, at least this share of draws differs. At temperature 0 it is 1 where the likeliest
    tokens differ, else 0.

    Args:
        reference, logits: float [tokens, vocabulary].
        temperature, top_k: as `Sampling` takes them, and temperature 0 for the likeliest token.
    """
    if not temperature:
        return (reference.argmax(-1) != logits.argmax(-1)).double()
    p, q = (_drawn_from(given, temperature, top_k) for given in (reference, logits))
    return (p - q).abs().sum(-1, dtype=torch.float64) / 2


def _drawn_from(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        best, index = scaled.topk(top_k)
        scaled = torch.full_like(scaled, -torch.inf).scatter_(-1, index, best)
    return scaled.softmax(-1)
