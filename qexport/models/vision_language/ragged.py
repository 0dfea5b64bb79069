"""Rows of pictures that have different numbers of them, without gaps, in tensors whose sizes depend on no value."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def in_front(rows: Tensor, there: Tensor) -> Tensor:
    """The rows that are there in their order, and zeros behind them.

    Args:
        rows: [pictures, rows, features].
        there: bool [pictures, rows].

    Returns:
        [pictures * rows, features].
    """
    flat, here = rows.flatten(0, 1), there.flatten()
    count = flat.shape[0]
    place = torch.where(here, here.long().cumsum(0) - 1, count)  # the last place is nobody's
    source = torch.zeros(count + 1, dtype=torch.int64).scatter(0, place, torch.arange(count))[:count]
    return torch.where((torch.arange(count) < here.long().sum())[:, None], flat[source], 0.0)


def behind_zeros(parts: Sequence[Tensor], count: int) -> Tensor:
    """What `in_front` makes, of the rows of each picture [rows, features]; count: of all rows."""
    rows = torch.cat(list(parts))
    return pad(rows, (0, 0, 0, count - len(rows)))
