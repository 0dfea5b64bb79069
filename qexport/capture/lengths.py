"""len of a tensor as its first size, which may be free: Python's own is a number, and a graph is of that size then."""

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LEN = "len"
_OWN = "torch"  # PyTorch's modules do without


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else builtins.len(value)


@contextmanager
def lengths_as_sizes(model: torch.nn.Module) -> Iterator[None]:
    """Within it `len` in the files that a model's modules are written in gives the first size of a tensor."""
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    places = [vars(sys.modules[name]) for name in names if name in sys.modules and name.partition(".")[0] != _OWN]
    changed = [place for place in places if _LEN not in place and place is not vars(builtins)]
    for place in changed:
        place[_LEN] = _length
    try:
        yield
    finally:
        for place in changed:
            del place[_LEN]
