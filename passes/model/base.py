"""The contract of a pass over a whole model.

Passes of the block loop see one block at a time and keep what it hands on. What changes values that cross blocks, such
as a rotation of the residual stream, has to be decided for all blocks at once, before a weight is read. Such a pass
edits the graphs, says which weights are to be read otherwise, and declares how values that cross blocks change.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

import torch

from ...capture.graph import CapturedModel, WeightSource
from ..base import SiteRecord

Read = Callable[[str], torch.Tensor]
Make = Callable[[Read], torch.Tensor]


@dataclass
class ModelResult:
    """The account of a pass over a model.

    Attributes:
        changed, skipped: what was done where, and what was left alone and why.
    """

    changed: list[SiteRecord] = field(default_factory=list)
    skipped: list[SiteRecord] = field(default_factory=list)


class ModelPass(ABC):
    """Base of passes over a whole model. Subclasses are frozen dataclasses of options."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def call(self, captured: CapturedModel) -> ModelResult:
        """Change the graphs and what the weights are read as, in place, and declare it in `captured.basis`.

        Raises:
            PassError: it cannot work on this model, and why; nothing has been changed then.
        """


@dataclass(frozen=True)
class ChangedWeights:
    """The weights of a model, some of them made of others when they are read.

    Attributes:
        source: the weights as they were.
        made: by name, what makes the tensor from those of the source.
        added: names of tensors that the source does not have.
    """

    source: WeightSource
    made: Mapping[str, Make]
    added: Set[str] = frozenset()

    def load(self, name: str) -> torch.Tensor:
        """A weight, float32 where it is floating point; raises as the source does."""
        return self.made[name](self.source.load) if name in self.made else self.source.load(name)


def change_weights(captured: CapturedModel, made: Mapping[str, Make], added: Set[str] = frozenset()) -> None:
    """Let weights of a model be made of others from now on, beside or on top of what passes before have changed.

    Args:
        made, added: as of `ChangedWeights`; what is read is what passes before made.
    """
    before = captured.weights
    if not isinstance(before, ChangedWeights):
        captured.weights = ChangedWeights(before, made, added)
        return
    behind = {name: partial(_behind, make, before.made) for name, make in made.items()}
    captured.weights = ChangedWeights(before.source, {**before.made, **behind}, before.added | added)


def _behind(make: Make, before: Mapping[str, Make], read: Read) -> torch.Tensor:
    return make(lambda name: before[name](read) if name in before else read(name))
