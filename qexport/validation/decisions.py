"""What two models decide by an output: a class, yes or no, how near two embeddings are, which text scores highest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.heads import Decision

# How outputs end by which something is decided.
_LOGITS, _EMBEDDINGS = ("logits", "logits_per_image"), ("embedding", "embeddings")
_FEWEST = 3  # numbers of which an order says anything


def decisions(name: str, want: Sequence[Tensor], got: Sequence[Tensor], decides: Decision) -> dict[str, Any]:
    """Measures of an output, as fields of a `ValueComparison`; empty of one that decides nothing.

    Args:
        name: of the output.
        want, got: of the float and the deployed model, a tensor for each batch.
        decides: what its logits or embedding are read for.
    """
    if decides == "embedding":
        return _near(_rows(want), _rows(got)) if name.endswith(_EMBEDDINGS) else {}
    if not decides or not name.endswith(_LOGITS) or want[0].dim() < 2:
        return {}
    if decides == "yes or no":
        yes = torch.cat([(w > 0).flatten() == (g > 0).flatten() for w, g in zip(want, got, strict=True)])
        return {"choices": len(yes), "same_choice": float(yes.double().mean())}
    axis = 1 if decides == "class of a pixel" else -1
    want, got = ([tensor.movedim(axis, -1) for tensor in values] for values in (want, got))
    if want[0].shape[-1] == 1:
        return {"rank_correlation": rank_correlation(_rows(want)[:, 0], _rows(got)[:, 0])}
    same, kl = [], []
    for wanted, found in zip(want, got, strict=True):
        p, q = (t.flatten(0, -2).double().log_softmax(-1) for t in (wanted, found))
        same.append(p.argmax(-1) == q.argmax(-1))
        kl.append((p.exp() * torch.where(p == -torch.inf, 0.0, p - q)).sum(-1))
    equal, divergence = torch.cat(same).double(), torch.cat(kl)
    return {"choices": len(equal), "same_choice": float(equal.mean()), "choice_kl": float(divergence.mean())}


def _rows(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten(0, -2) for value in values]).double()


def _near(want: Tensor, got: Tensor) -> dict[str, Any]:
    cosines = torch.nn.functional.cosine_similarity(want, got, dim=-1)
    found: dict[str, Any] = {"row_cosine": float(cosines.mean())}
    pairs = torch.triu_indices(len(want), len(want), offset=1)
    if pairs.shape[1] >= _FEWEST:
        wanted, given = (torch.nn.functional.normalize(rows, dim=-1) for rows in (want, got))
        similar = ((rows @ rows.t())[pairs[0], pairs[1]] for rows in (wanted, given))
        found["rank_correlation"] = rank_correlation(*similar)
    return found


def rank_correlation(want: Tensor, got: Tensor) -> float | None:
    """Spearman's correlation of two rows of numbers; None of fewer than three, or where one has no order."""
    if len(want) < _FEWEST:
        return None
    ranks = [_ranks(values) for values in (want, got)]
    centred = [rank - rank.mean() for rank in ranks]
    spread = torch.sqrt(centred[0].square().sum() * centred[1].square().sum())
    return float((centred[0] * centred[1]).sum() / spread) if spread > 0 else None


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order, those of equal numbers the mean of theirs."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below.double() + (equal - 1).double() / 2
