"""From logits to the next token: the likeliest one, or a draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. Filters apply in the order temperature, top_k, top_p.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al., "The Curious
            Case of Neural Text Degeneration", 2020); 1 keeps all.
        seed: start of the random numbers.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature} is not above 0", remedy="For the likeliest token: greedy")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise InputError(f"{self}: top_k and seed are 0 or more, top_p is above 0 and at most 1")


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Distribution the next token is drawn from: float64 [vocab] for logits [vocab] of any float dtype."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = _likeliest_first(scaled, sampling)
    kept = scaled[order]
    kept = np.exp(kept - kept.max())
    kept /= kept.sum()
    if sampling.top_p < 1 and not isinstance(order, slice):
        # The token that reaches p belongs to the set, so the first one always stays.
        count = int(np.searchsorted(np.cumsum(kept), sampling.top_p)) + 1
        order, kept = order[:count], kept[:count]
        kept /= kept.sum()
    result = np.zeros(scaled.shape)
    result[order] = kept
    return result


def _likeliest_first(scaled: np.ndarray, sampling: Sampling) -> np.ndarray | slice:
    """Tokens that top_k keeps, likeliest first where top_p has to know.

    Sorting a whole vocabulary takes longer than a step of a small model, so it is done only where the order matters.
    """
    if not sampling.top_k and sampling.top_p == 1:
        return slice(None)
    tokens, count = np.arange(len(scaled)), sampling.top_k or len(scaled)
    if count < len(scaled):
        last = np.partition(-scaled, count - 1)[count - 1]
        tokens = np.flatnonzero(~(-scaled > last))  # with all that tie for the last place
    return tokens[np.argsort(-scaled[tokens], kind="stable")][:count]


def choose(
    logits: np.ndarray, sampling: Sampling | None, generators: Sequence[np.random.Generator] | None
) -> np.ndarray:
    """Next token of each row: int64 [batch] for logits [batch, vocab]; one generator for each row."""
    if sampling is None or generators is None:
        return np.argmax(logits, axis=-1).astype(np.int64)
    rows = zip(logits, generators, strict=True)
    # Inverse of the cumulative distribution: one random number a token, whatever the vocabulary.
    return np.array([_draw(probabilities(row, sampling), generator.random()) for row, generator in rows], np.int64)


def _draw(distribution: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(distribution)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
