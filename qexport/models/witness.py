"""Who else can say what a model computes: what validates an export is never read by the export's own reader alone.

A witness computes what the captured graph claims to compute, from weights that it reads itself. Of folders of
transformers it is transformers' own model; of an nn.Module the module; of a checkpoint of codes it may be the published
formula. `validation.reader` runs the graph on a witness's calls and compares.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outline:
    """What a witness has to know of the captured graph.

    Attributes:
        blocks: names of its blocks in order: module paths, and "prologue" and "epilogue".
        inputs, outputs: their public names.
        float_bytes: of all weights in float32, tied ones once.
        memory: bytes that the witness may take.
    """

    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_bytes: int
    memory: int

    @property
    def fits(self) -> bool:
        return self.float_bytes <= self.memory


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        feeds: its inputs by public name; in place of past_key_values the caller takes what the call before made, and
            for the first call nothing.
        outputs: what it makes, by public name.
        states: what blocks hand on, by their names, as far as the witness knows.
    """

    feeds: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    states: Mapping[str, Tensor] = field(default_factory=dict)


class ReadWeight(Protocol):
    """A weight by its name in the graph's model, or a row of a stack; None where it is not known."""

    def __call__(self, name: str, row: int | None = None) -> Tensor | None: ...


def no_weight(name: str, row: int | None = None) -> None:
    """Of a witness whose weights go by other names."""


@dataclass(frozen=True)
class Testimony:
    """What a witness says.

    Attributes:
        name: of the witness, such as "transformers 5.23.0, LlamaForCausalLM".
        calls: in order; see `Call`.
        kept: names of the layers that took part, as a model of their own; None: all.
        weight: the tensor that the witness read under a name of the graph's, None where it knows none.
        eps: unit roundoff of what it computes in.
    """

    name: str
    calls: Sequence[Call]
    kept: tuple[str, ...] | None = None
    weight: ReadWeight = no_weight
    eps: float = torch.finfo(torch.float32).eps

    def described(self) -> str:
        """What was run, in words."""
        sizes = [next(iter(call.feeds.values())).shape for call in self.calls]
        if len(sizes) == 3 and sizes[1][1:] == (1,):
            return f"{sizes[0][0]} rows of {sizes[0][1]} tokens and {len(sizes) - 1} cached steps"
        return " and ".join(f"inputs of {' x '.join(map(str, shape))}" for shape in sizes)


class Absent(Exception):
    """A witness that cannot say anything, and why."""


class Witness(Protocol):
    """Anything that can say what a captured graph has to compute."""

    def testify(self, outline: Outline) -> Testimony:
        """Run the model.

        Raises:
            Absent: it cannot.
        """
        ...


def module_of(witness: Witness | None) -> torch.nn.Module | None:
    """The module that a witness runs, where that is in memory as a whole, and takes the graph's inputs by name."""
    return getattr(witness, "module", None)


@dataclass(frozen=True)
class ModuleWitness:
    """A module's own forward.

    Attributes:
        module: itself.
        name: of its class.
        run: from inputs by name to outputs by name, in evaluation mode.
        feeds: inputs of each call.
        eps: unit roundoff of what it computes in.
    """

    module: torch.nn.Module
    name: str
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    feeds: Sequence[Mapping[str, Tensor]]
    eps: float = torch.finfo(torch.float32).eps

    def __deepcopy__(self, memo):
        return self  # the module is the user's, and stays one

    def testify(self, outline: Outline) -> Testimony:
        calls = []
        for number, given in enumerate(self.feeds):
            try:
                # A module may write into what it is given.
                made = self.run({name: tensor.clone() for name, tensor in given.items()})
            except Exception as error:  # of the user's own code, on a size that they did not try
                if number == 0:
                    raise Absent(f"its own forward fails on the example inputs: {first_line(error)}") from error
                continue
            calls.append(Call(given, made))
        return Testimony(self.name, calls, eps=self.eps)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a nested result; places in a tuple are numbers behind the name of the whole."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path or 'output'}_{index}")
    else:
        yield path or "output", value


def first_line(error: BaseException) -> str:
    """The type and the first line of an error of somebody else's code."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
