"""What transformers' model says, and how it was loaded for that."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..witness import Absent, Call, Outline, Testimony
from .loading import loaded, opened_by_modules

if TYPE_CHECKING:
    from ..source import ModelFolder

_Calls = Callable[[PreTrainedModel], list[Call]]


def said_by_modules(
    loader: type[Any], folder: "ModelFolder", calls: _Calls, absent: frozenset[str] = frozenset()
) -> Testimony:
    """What the whole model says, the weights of one module in memory at a time.

    Args:
        absent: weights that may be missing.

    Raises:
        Absent: transformers cannot build or run it.
    """
    model, weights = opened_by_modules(loader, folder, absent)
    return replace(said_by(model, calls(model), note=", a module at a time"), weight=weights.read)


def said_independently(
    loader: type[Any], folder: "ModelFolder", captured: PreTrainedModel | None, outline: Outline, calls: _Calls,
    absent: frozenset[str] = frozenset(),
) -> Testimony:  # fmt: skip
    """What a model says that was in memory for the capture, or was not: then a module at a time, if that can be.

    A second one is loaded where it fits beside the first, which else runs again.

    Raises:
        Absent: it fits nowhere, or as above.
    """
    if captured is None:
        with suppress(Absent):
            return said_by_modules(loader, folder, calls, absent)
    model = loaded(loader, folder, absent) if outline.fits else captured
    if model is None:
        raise Absent("its float32 weights do not fit into memory")
    return said_by(model, calls(model), again=model is captured)


def said_by(
    model: PreTrainedModel, calls: Sequence[Call], *, kept: tuple[str, ...] | None = None, again: bool = False,
    source: Path | None = None, tensors: Mapping[str, Tensor] | None = None, note: str = "",
) -> Testimony:  # fmt: skip
    if again:
        note = " on the weights that were captured, for want of memory"
    elif source:
        note = " of the GGUF file"
    name = f"transformers {transformers.__version__}, {type(model).__name__}{note}"
    held = tensors or tensors_by_name(model)

    def weight(name: str, row: int | None = None) -> Tensor | None:
        found = held.get(name)
        return found if found is None or row is None else found[row]

    return Testimony(name, calls, kept, weight)


def tensors_by_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    tensors = dict(model.named_buffers(remove_duplicate=False))
    return tensors | {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
