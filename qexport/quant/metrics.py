"""How far a quantized result is from the float one. Sums are float64, in pieces, so that large logits fit."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one piece: float64 temporaries of this size come to about 40 MB together.
_PIECE = 1 << 19


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum ref^2 / sum (ref - value)^2) in dB.

    +inf when they are equal, -inf when only the reference is zero, nan when either has nan.
    """
    signal = noise = 0.0
    for ref, val in _pieces(reference, value):
        signal += float(ref.square().sum())
        noise += float((ref - val).square_().sum())
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise) if math.isfinite(signal / noise) else math.nan


def cosine(reference: Tensor, value: Tensor) -> float:
    """Cosine of the angle between the two flattened tensors; 1 when both are zero, 0 when one is."""
    dot = ref_square = val_square = 0.0
    for ref, val in _pieces(reference, value):
        dot += float(torch.dot(ref, val))
        ref_square += float(torch.dot(ref, ref))
        val_square += float(torch.dot(val, val))
    if ref_square == 0 or val_square == 0:
        return float(ref_square == val_square)
    return dot / math.sqrt(ref_square) / math.sqrt(val_square)


def kl_divergence(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(ref_logits) || softmax(logits)) of every token, float64 [tokens], in nats.

    Args:
        ref_logits, logits: float [tokens, vocabulary].
    """
    out = torch.empty(ref_logits.shape[0], dtype=torch.float64)
    for rows in _rows(ref_logits):
        ref = torch.log_softmax(ref_logits[rows].double(), -1)
        difference = ref - torch.log_softmax(logits[rows].double(), -1)
        # Rounding may leave a hair below zero where the distributions are equal.
        out[rows] = ref.exp_().mul_(difference).sum(-1).clamp_min_(0)
    return out


def top1_agreement(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both would pick the same token greedily: bool [tokens] for logits [tokens, vocabulary]."""
    return ref_logits.argmax(-1) == logits.argmax(-1)


def top_two_margin(logits: Tensor) -> Tensor:
    """By how much the likeliest token is likelier than the second one: float64 [tokens], 0 to 1.

    Args:
        logits: float [tokens, vocabulary].
    """
    out = torch.empty(logits.shape[0], dtype=torch.float64)
    for rows in _rows(logits):
        piece = logits[rows].double()
        best = piece.topk(min(2, piece.shape[-1]), -1).values
        likely = (best - torch.logsumexp(piece, -1, keepdim=True)).exp_()
        out[rows] = likely[:, 0] - (likely[:, 1] if likely.shape[1] > 1 else 0.0)
    return out


def all_finite(logits: Tensor) -> Tensor:
    """Whether a token's logits are all numbers: bool [tokens] for logits [tokens, vocabulary]."""
    return torch.cat([torch.isfinite(logits[rows]).all(-1) for rows in _rows(logits)])


def separation(values: Tensor, marked: Tensor) -> float | None:
    """How often a marked value is below one that is not, ties half: 0.5 where values say nothing of marks (AUC).

    Args:
        values: float [n]; marked: bool [n].

    Returns:
        None where all are marked, or none.
    """
    count = int(marked.sum())
    if not 0 < count < len(marked):
        return None
    _, place, same = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    ranks = (same.cumsum(0).double() - (same.double() - 1) / 2)[place]  # from 1, the mean of those that are alike
    above = count * (count + 1) / 2 + count * (len(marked) - count) - float(ranks[marked].sum())
    return above / (count * (len(marked) - count))


def top_k_agreement(ref_logits: Tensor, logits: Tensor, k: int) -> Tensor:
    """Share of the reference's k likeliest tokens that are among the other's k: float64 [tokens].

    Args:
        ref_logits, logits: float [tokens, vocabulary]; with fewer than k tokens in the vocabulary the share is 1.
    """
    k = min(k, ref_logits.shape[-1])
    reference, found = ref_logits.topk(k, -1).indices, logits.topk(k, -1).indices
    return (reference[:, :, None] == found[:, None, :]).any(-1).double().mean(-1)


def by_stretch(values: Tensor, most: int) -> Tensor:
    """Means of the columns [n, S] in at most `most` stretches of equal length, in order; the last may be shorter.

    Args:
        values: float64 [n, S].

    Returns:
        float64 [m], m <= most.
    """
    length = -(-values.shape[1] // most)
    return torch.stack([piece.mean() for piece in values.split(length, dim=1)])


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every target, float64 [tokens], in nats; exp of its mean is the perplexity.

    Args:
        logits: float [tokens, vocabulary].
        targets: int64 [tokens].
    """
    out = torch.empty(logits.shape[0], dtype=torch.float64)
    for rows in _rows(logits):
        piece = logits[rows].double()
        out[rows] = torch.logsumexp(piece, -1) - piece.gather(-1, targets[rows, None]).squeeze(-1)
    return out


def _pieces(reference: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for ref, val in zip(reference.reshape(-1).split(_PIECE), value.reshape(-1).split(_PIECE), strict=True):
        yield ref.double(), val.double()


def _rows(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    step = max(1, _PIECE // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
