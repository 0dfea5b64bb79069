"""Running transformers' model on random tokens, and watching its blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tokens import embedding_rows
from ..witness import Absent, first_line

ROWS, PROMPT, STEPS = 2, 16, 2


def watched(model: PreTrainedModel, blocks: Sequence[str]) -> dict[str, torch.nn.Module]:
    modules = dict(model.named_modules())
    return {name: modules[name] for name in blocks if name in modules}


@contextmanager
def watching(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules make while the `with` runs, by name; of several values the first."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(module, inputs, result):
            seen[name] = result if isinstance(result, Tensor) else result[0]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def random_tokens(model: PreTrainedModel, shape: Sequence[int]) -> Tensor:
    """Token ids, the same at every call."""
    vocabulary = embedding_rows(model)
    return torch.randint(0, vocabulary, tuple(shape), generator=torch.Generator().manual_seed(0))


def run(model: Callable, **feeds):
    try:
        with torch.no_grad():
            return model(**feeds)
    except Exception as error:  # of transformers' code, or of the model's
        raise Absent(f"transformers cannot run it ({first_line(error)})") from error
