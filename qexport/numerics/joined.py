"""Tensors that are made of others whenever somebody reads them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Joined:
    """Tensors side by side along their last axis, or matrices along a diagonal.

    Attributes:
        parts: their names, in order; a number stands for a vector of so many zeros.
        diagonal: matrices [r_i, n_i] become one [sum r_i, sum n_i] with zeros beside them.
    """

    parts: tuple[str | int, ...]
    diagonal: bool = False

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, in the dtype of its parts.

        Args:
            read: a part by its name; at least one has one.
        """
        found = {part: read(part) for part in self.parts if isinstance(part, str)}
        like = next(iter(found.values()))
        parts = [like.new_zeros(part) if isinstance(part, int) else found[part] for part in self.parts]
        return torch.block_diag(*parts) if self.diagonal else torch.cat(parts, dim=-1)
