"""A model called otherwise than by its own forward while it is traced; names of its modules stay what they are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def called_by(
    model: PreTrainedModel, names: Sequence[str], run: Callable[[PreTrainedModel, Mapping[str, Tensor]], dict]
):
    """Give a model a forward of keyword arguments of these names, which hands them to `run` by name."""

    def forward(**given):
        return run(model, given)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # what inspect reads
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
