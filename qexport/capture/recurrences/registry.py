"""Parts of transformers' models that compute recurrences, and what takes their place while a model is traced."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch

_FUNCTIONS: dict[str, Callable] = {}
_FORWARDS: dict[str, Callable] = {}


def stands_for(*names: str) -> Callable[[Callable], Callable]:
    """Declare that a function takes the place of those of these names, with their arguments and results."""

    def declare(function: Callable) -> Callable:
        _FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return declare


def stands_for_forward(*names: str) -> Callable[[Callable], Callable]:
    """Declare that a function takes the place of the forward of modules of these classes.

    It is given the module and its path in front of the forward's own arguments.
    """

    def declare(function: Callable) -> Callable:
        _FORWARDS.update(dict.fromkeys(names, function))
        return function

    return declare


@contextmanager
def recurrences_as_nodes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the `with` the recurrences of a model's code are nodes of the graph, whatever the number of tokens."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as stack:
        for file in files:
            for name, function in _FUNCTIONS.items():
                if hasattr(file, name):
                    stack.enter_context(patch.object(file, name, function))
        for path, module in model.named_modules():
            if (forward := _FORWARDS.get(type(module).__name__)) is not None:
                stack.enter_context(patch.object(module, "forward", partial(forward, module, path)))
        yield
