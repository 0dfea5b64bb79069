"""Calibration sequences, and how they are made of tables and rows of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class Samples:
    """Calibration sequences, padded on the left as in batched generation.

    Attributes:
        input_ids: int64 [n, S]; 0 where attention_mask is 0.
        attention_mask: int64 [n, S]; 0 on padding, 1 on tokens; every row ends with 1.
        described: what they are, for reports.
    """

    input_ids: Tensor
    attention_mask: Tensor
    described: str


def whole(ids: Tensor, described: str) -> Samples:
    """Sequences int64 [n, S] without padding."""
    return Samples(ids, torch.ones_like(ids), described)


def of_rows(rows: Sequence[list[int]], described: str) -> Samples:
    """One sequence for each row of ids, padded to the longest; {} in `described` is how many tokens that has."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    return Samples(ids, mask, described.format(longest))


def integers(values: Any, what: str) -> Tensor:
    """A table of integers as int64 [n, S].

    Raises:
        InputError: it is none, or empty; `what` says of what.
    """
    try:
        values = values.cpu() if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError):
        raise InputError(f"{what} are not a table of integers", remedy="Give integers [n, S]") from None
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex() or values.dim() != 2:
        raise InputError(
            f"{what} of {str(values.dtype).removeprefix('torch.')} {list(values.shape)}", remedy="Give integers [n, S]"
        )
    if not values.numel():
        raise InputError("there are no samples", place=what, remedy="Give at least one")
    return values.long()


def padded_left(ids: Tensor, mask: Tensor, described: str) -> Samples:
    """Sequences int64 [n, S] with their mask, the padding moved to the left.

    Raises:
        InputError: the mask does not fit.
    """
    if mask.shape != ids.shape or ((mask != 0) & (mask != 1)).any() or not mask.any(dim=1).all():
        raise InputError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}",
            remedy="It holds 1 for tokens and 0 for padding, and at least one token in each row",
        )
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    return Samples(ids * mask, mask, described)


def spread(count: int, n: int, seed: int) -> Tensor:
    """n of count positions, one at random out of each of n equal stretches."""
    edges = torch.arange(n + 1) * count // n
    chance = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (chance * edges.diff()).long()
