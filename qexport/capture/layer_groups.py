"""Which layers of a decoder do the same, found by running it once without data.

torch.export spends a sixth of a second on a layer. Running a model on fake tensors of fixed sizes takes a few
milliseconds a layer and shows every operator that a layer calls, with all its arguments: two layers that call the same
ones on the same things, each on its own weights and its own cache, are one layer to whoever traces.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_SMALL = 64  # elements of a constant tensor that are compared by value


@dataclass(frozen=True)
class LayerGroups:
    """The repeated layers of a model.

    Attributes:
        container: module path of the list that holds them.
        first: for each layer the number of the first layer that does the same.
    """

    container: str
    first: tuple[int, ...]

    @property
    def needed(self) -> int:
        """How many layers from the start contain one of every kind."""
        return max(self.first) + 1


def find_layers(
    model: torch.nn.Module, caches: Sequence[Sequence[torch.Tensor]], names: dict[int, str], run: Callable[[], Any]
) -> LayerGroups | None:
    """Compare the layers of a model by what they do in one run.

    Args:
        model: on fake tensors.
        caches: the tensors that belong to each layer besides its weights.
        names: the canonical name of every parameter and buffer, by id of the tensor.
        run: calls the model; fake tensors, all sizes fixed.

    Returns:
        None where there is no list of layers as long as `caches`, or where the layers do not simply run one after
        another, or the model cannot be run in this way.
    """
    found = _container(model, len(caches))
    if found is None:
        return None
    container, layers = found
    record = _Record(container, len(layers), names, caches)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(record.enter(index)).remove)
            stack.callback(layer.register_forward_hook(record.leave).remove)
        try:
            with torch.no_grad(), record:
                run()
        except Exception:  # whatever it is, torch.export meets it too and says so
            return None
    signatures = record.signatures()
    return LayerGroups(container, tuple(map(signatures.index, signatures))) if signatures else None


def _container(model: torch.nn.Module, count: int) -> tuple[str, torch.nn.ModuleList] | None:
    """The list of `count` modules that holds most of the parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    weigh = lambda item: sum(p.numel() for p in item[1].parameters())  # noqa: E731
    return max(lists, key=weigh, default=None)


class _Record(TorchDispatchMode):
    """What every layer calls while this is on, in names that are relative to the layer where a thing is its own."""

    def __init__(self, container: str, count: int, names: dict[int, str], caches: Sequence[Sequence[torch.Tensor]]):
        super().__init__()
        self._container, self._count, self._weights = container, count, names
        self._caches = {id(t): (index, part) for index, cache in enumerate(caches) for part, t in enumerate(cache)}
        self._made: dict[int, tuple] = {}
        self._alive: list[Any] = []  # an id stands for a tensor only while it lives
        self._calls: list[list[tuple]] = []
        self._inside, self._outside, self._simple = False, 0, True

    def enter(self, index: int) -> Callable:
        def hook(module, args) -> None:
            self._simple &= not self._inside and index == len(self._calls)
            self._inside = True
            self._calls.append([])

        return hook

    def leave(self, module, args, result) -> None:
        for place, tensor in enumerate(_tensors(result)):
            self._name(tensor, ("result", len(self._calls) - 1, place))
        self._inside = False

    def signatures(self) -> list[list[tuple]] | None:
        """What each layer did; None where they did not run one after another, each on what the one before returned."""
        return self._calls if self._simple and len(self._calls) == self._count else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._inside:
            place = ("own", len(self._calls) - 1, len(self._calls[-1]))
            self._calls[-1].append((str(function), tree_map(self._describe, (args, kwargs))))
        else:
            self._simple &= len(self._calls) in (0, self._count)  # work between two layers could be for one of them
            place = ("outside", self._outside)
            self._outside += 1
        for number, tensor in enumerate(_tensors(result)):
            if id(tensor) not in self._made:  # in-place operators return what they were given
                self._name(tensor, (*place, number))
        return result

    def _name(self, tensor: torch.Tensor, name: tuple) -> None:
        self._made[id(tensor)] = name
        self._alive.append(tensor)

    def _describe(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__, value
        now, key, kind = len(self._calls) - 1, id(value), (value.dtype, tuple(value.shape))
        if key in self._made:
            what, *where = self._made[key]
            if what == "outside":
                return what, *where
            layer, *where = where
            self._simple &= layer == (now if what == "own" else now - 1)
            return what, *where
        if key in self._caches:
            layer, part = self._caches[key]
            return "cache", layer - now, part, kind
        if key in self._weights:
            return "weight", self._weights[key].removeprefix(f"{self._container}.{now}."), kind
        constant = getattr(value, "constant", None) if isinstance(value, FakeTensor) else value
        if constant is not None and constant.numel() <= _SMALL:
            with _disable_current_modes():
                return "constant", constant.tolist(), kind
        self._alive.append(value)
        return "given", key


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
