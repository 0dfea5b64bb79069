"""A model that reads its input whole, as a witness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from ..witness import Call, Outline, Testimony, leaves
from .loading import quiet
from .running import run, watched, watching
from .said import said_independently

if TYPE_CHECKING:
    from ..source import ModelFolder


@dataclass(frozen=True)
class EncoderWitness:
    """A model that reads its input whole, with the head that its config names.

    Attributes:
        loader: an auto class of transformers.
        captured: the model that the graph was made from, which runs again where a second one does not fit into memory;
            None where that has no weights.
        absent: weights that no checkpoint has; what depends on them is no output of the graph.
        inputs: of every call.
    """

    folder: "ModelFolder"
    loader: type[Any]
    captured: PreTrainedModel | None
    absent: frozenset[str]
    inputs: Sequence[Mapping[str, Tensor]]

    @property
    def module(self) -> PreTrainedModel | None:
        """See `module_of`."""
        return self.captured

    def __deepcopy__(self, memo):
        return self

    def testify(self, outline: Outline) -> Testimony:
        with quiet():
            return said_independently(
                self.loader, self.folder, self.captured, outline, lambda model: self._calls(model, outline), self.absent
            )

    def _calls(self, model: PreTrainedModel, outline: Outline) -> list[Call]:
        modules, calls = watched(model, outline.blocks), []
        for feeds in self.inputs:
            with watching(modules) as states:
                made = run(model, **feeds)
            calls.append(Call(feeds, {n: t for n, t in leaves(made) if n in outline.outputs}, dict(states)))
        return calls
