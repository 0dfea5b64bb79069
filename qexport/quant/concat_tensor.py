"""Tensors that are made of others whenever somebody reads them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConcatTensor:
    """Tensors side by side along their last axis.

    Attributes:
        parts: their names, in order; a number stands for a vector of so many zeros.
    """

    parts: tuple[str | int, ...]

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, in the dtype of its parts.

        Args:
            read: a part by its name; at least one has one.
        """
        found = [read(part) if isinstance(part, str) else part for part in self.parts]
        like = next(part for part in found if isinstance(part, Tensor))
        return torch.cat([like.new_zeros(part) if isinstance(part, int) else part for part in found], dim=-1)
