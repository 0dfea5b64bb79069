"""Which dimensions of a module's inputs may change: as qexport writes them, and as torch.export does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim

from ..errors import InputError

Axes = Mapping[str, Mapping[int, str]]
"""By the name of an input, the dimensions that may change and what they are called."""
DynamicShapes = Mapping[str, Any] | Sequence[Any]
"""`Axes`, or what torch.export takes for its argument `dynamic_shapes`."""


class Hint(str):
    """The name of a dimension that may turn out never to change."""


_HINTS = (Dim.AUTO, Dim.DYNAMIC, Dim.STATIC)
_REMEDY = 'Write {"input": {0: "batch", 1: "length"}}, dimensions from 0'


def dynamic_axes(given: Mapping[str, torch.Tensor], wanted: DynamicShapes | None) -> dict[str, dict[int, str]]:
    """The dimensions of every input that may change, with a name for each.

    Args:
        given: the inputs by name.
        wanted: None for the first dimension of every input: "batch" where it is as long as the first input's.

    Raises:
        InputError: an input or a dimension that is not there, or something that names no dimension.
    """
    size = next(iter(given.values())).shape[0]
    if wanted is None:
        return {name: {0: "batch" if t.shape[0] == size else f"{name}.batch"} for name, t in given.items()}
    by_name = _by_name(given, wanted)
    return {name: _axes(name, tensor, by_name.get(name), size) for name, tensor in given.items()}


def _by_name(given: Mapping[str, torch.Tensor], wanted: DynamicShapes) -> Mapping[str, Any]:
    if isinstance(wanted, Mapping):
        if unknown := [name for name in wanted if name not in given]:
            raise _refused(f"no input is called {unknown[0]}", f"There are {', '.join(given)}")
        return wanted
    if not isinstance(wanted, Sequence) or isinstance(wanted, str):
        raise _refused(f"a {type(wanted).__name__} says nothing of inputs by name or in order")
    if len(wanted) != len(given):
        raise _refused(f"{len(wanted)} entries for {len(given)} inputs", f"There are {', '.join(given)}")
    return dict(zip(given, wanted, strict=True))


def _axes(name: str, tensor: torch.Tensor, entry: Any, batch: int) -> dict[int, str]:
    if entry is None:
        return {}
    if not isinstance(entry, (Mapping, Sequence)) or isinstance(entry, str):
        raise _refused(f"{entry!r} are no dimensions of {name}")
    if not isinstance(entry, Mapping) and len(entry) != tensor.dim():
        raise _refused(f"{len(entry)} dimensions of {name}, which has {tensor.dim()}")
    axes: Iterable[tuple[Any, Any]] = entry.items() if isinstance(entry, Mapping) else enumerate(entry)
    found = {}
    for axis, what in axes:
        if not isinstance(axis, int) or not 0 <= axis < tensor.dim():
            raise _refused(f"{name} has no dimension {axis!r} to call {_shown(what)!r}")
        label = _label(name, axis, what, tensor.shape[axis], batch)
        if label is not None:
            found[axis] = label
    return found


def _label(name: str, axis: int, what: Any, size: int, batch: int) -> str | None:
    """What a dimension is called; None where it never changes."""
    if what is None or what is Dim.STATIC or (isinstance(what, int) and what == size):
        return None
    if isinstance(what, str) and what:
        return what
    if any(what is hint for hint in _HINTS):
        return Hint("batch" if axis == 0 and size == batch else f"{name}_{axis}")
    if isinstance(what, (Dim, type)) and _shown(what).isidentifier():
        return _shown(what)
    raise _refused(f"{_shown(what)!r} is no name for dimension {axis} of {name}")


def _shown(what: Any) -> str:
    return str(getattr(what, "__name__", what))


def _refused(why: str, remedy: str = _REMEDY) -> InputError:
    return InputError(why, place="dynamic_shapes", remedy=remedy)
