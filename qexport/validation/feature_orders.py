"""Values whose features a file has in another order than the float model, put in the one or the other."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..artifact.manifest import LinearEntry


class FeatureOrders:
    """By the name of a value in the file, the order of its features.

    Args:
        entries: of the manifest's linears, which say in which order they read and make features.
    """

    def __init__(self, entries: Iterable[LinearEntry]):
        self._of: dict[str, list[tuple[int, Tensor]]] = {}
        for entry in entries:
            start = entry.columns[0] if entry.columns else 0
            for value, first, order in ((entry.input, 0, entry.reads_order), (entry.output, start, entry.makes_order)):
                if value and order is not None:
                    self._of.setdefault(value, []).append((first, torch.from_numpy(np.asarray(order))))

    def natural(self, value: str, tensor: Tensor) -> Tensor:
        """A value of the file, [..., features], in the order of the float model."""
        if value not in self._of:
            return tensor
        return tensor.index_select(-1, torch.argsort(self._places(value, tensor.shape[-1])))

    def in_file(self, value: str, tensor: Tensor) -> Tensor:
        """A value in the order of the float model, [..., features], as the file has it."""
        return tensor.index_select(-1, self._places(value, tensor.shape[-1])) if value in self._of else tensor

    def _places(self, value: str, width: int) -> Tensor:
        places = torch.arange(width)
        for start, order in self._of[value]:
            places[start : start + len(order)] = start + order
        return places
