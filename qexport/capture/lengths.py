"""len of a tensor as its first size, which may be free: Python's own is a number, and a graph is of that size then."""

import builtins
from contextlib import AbstractContextManager
from typing import Any

import torch

from .stand_ins import standing_in

_OWN = "torch"  # PyTorch's modules do without


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else builtins.len(value)


def lengths_as_sizes(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Within it `len` in the files that a model's modules are written in gives the first size of a tensor."""
    files = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    return standing_in("len", _length, (file for file in files if file.partition(".")[0] != _OWN))
