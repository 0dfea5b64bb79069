"""Dicts in which modules remember what they compute of their weights in a first call, to look it up in later ones.

torch.export refuses a call that changes its module. Such a dict (timm's LeViT has one for the biases of its attention)
is filled before, and emptied again behind; what it holds is a constant of the graph then, as a weight is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError


class RemembersMore(CaptureError):
    """Nothing of a module changed in a call but dicts, which have more entries."""


class Memos:
    """The dicts of a module's parts, as they are when this is made."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._before = [
            (part, name, memo, dict(memo)) for part in model.modules() for name, memo in vars(part).items()
            if isinstance(memo, dict) and not name.startswith("_")
        ]  # fmt: skip

    def forget(self) -> None:
        """Empty them of what came later."""
        for part, name, memo, held in self._before:
            memo.clear()
            memo.update(held)
            setattr(part, name, memo)  # torch.export puts a copy in its place

    def fill(self, given: Mapping[str, Tensor]) -> bool:
        """Fill them by a call of the module.

        Args:
            given: its inputs by name.

        Returns:
            whether what they hold is the same whatever it reads: otherwise it is a state, and no memo.
        """
        others = self._after({name: _others(tensor) for name, tensor in given.items()})
        return all(_alike(*pair) for pair in zip(others, self._after(given), strict=True))

    def _after(self, given: Mapping[str, Tensor]) -> list[dict[Any, Any]]:
        self.forget()
        self._model(**given)
        return [dict(memo) for _, _, memo, _ in self._before]


def _others(tensor: Tensor) -> Tensor:
    """Other values of the same kind: those of an input in another order, and floats shifted too."""
    turned = tensor.flatten().flip(0).view(tensor.shape)
    return turned + 1 if tensor.is_floating_point() else turned


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
