"""Functions of transformers' models that compute recurrences, and what takes their place while a model is traced."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

_STANDS_FOR: dict[str, Callable] = {}


def stands_for(*names: str) -> Callable[[Callable], Callable]:
    """Declare that a function takes the place of those of these names, with their arguments and results."""

    def declare(function: Callable) -> Callable:
        _STANDS_FOR.update(dict.fromkeys(names, function))
        return function

    return declare


@contextmanager
def recurrences_as_nodes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the `with` the recurrences of a model's code are nodes of the graph, whatever the number of tokens."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as stack:
        for file in files:
            for name, function in _STANDS_FOR.items():
                if hasattr(file, name):
                    stack.enter_context(patch.object(file, name, function))
        yield
