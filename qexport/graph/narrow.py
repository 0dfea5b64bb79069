"""Weights that wait in the 16 bits of their checkpoint, and are float32 to whoever computes with them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
_SAME = {aten.detach.default, aten.alias.default}


class NarrowTensor(Tensor):
    """A float32 tensor that is kept in a narrower dtype which holds its values exactly.

    Every operator gets it as float32, in memory of its own that is free again afterwards; another device keeps it as it
    is. Its values are never changed in place.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "NarrowTensor":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), dtype=torch.float32, device=held.device, requires_grad=False
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        given = args[0] if args else None
        if isinstance(given, cls) and function in _SAME:
            return cls(given.held)
        moves = function is aten._to_copy.default and set(kwargs) <= {"device", "non_blocking"}
        if isinstance(given, cls) and moves and torch.device(kwargs["device"]).type != "meta":
            return cls(given.held.to(kwargs["device"]))
        whole = lambda value: value.held.float() if isinstance(value, cls) else value  # noqa: E731
        return function(*tree_map(whole, args), **tree_map(whole, kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NarrowTensor({self.held!r})"


def narrowed_exactly(tensor: Tensor) -> Tensor:
    """A float32 tensor kept in 16 bits where these hold all of its values, else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        held = tensor.to(dtype)
        if torch.equal(held.float(), tensor):
            return NarrowTensor(held)
    return tensor


def widened(tensor: Tensor) -> Tensor:
    """A tensor that waits no longer; another one is given back as it is."""
    return tensor.held.float() if isinstance(tensor, NarrowTensor) else tensor


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one and the same in memory."""
    pair = [tensor.held if isinstance(tensor, NarrowTensor) else tensor for tensor in (one, other)]
    return pair[0].data_ptr() == pair[1].data_ptr()
