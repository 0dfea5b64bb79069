"""How long work tells its caller how far it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Progress = Callable[[str, str, int, int], None]
"""Called with the stage, what is being done, how many are done, how many there are."""

StageProgress = Callable[[str, int, int], None]
"""The same within a stage, which whoever calls it knows: `partial(progress, "quantize")`."""


def no_progress(stage: str, what: str, done: int, total: int) -> None:
    """A `Progress` that nobody looks at."""


def no_stage_progress(what: str, done: int, total: int) -> None:
    """A `StageProgress` that nobody looks at."""


@runtime_checkable
class Expecting(Protocol):
    """A `Progress` that wants to know beforehand which stages come, so that it can number them."""

    def expect(self, stages: Sequence[str]) -> None:
        """Stages that come, in order; one of them may have nothing to do. Those that it was told of stay."""


def announce(progress: Progress, *stages: str) -> None:
    """Tell a callback which stages come, if it is one that expects them."""
    if isinstance(progress, Expecting):
        progress.expect(stages)


def of_part(progress: Progress, part: str) -> Progress:
    """The progress of a part of a model, as part of the whole's."""
    return _OfPart(progress, part)


@dataclass(frozen=True)
class _OfPart:
    progress: Progress
    part: str

    def __call__(self, stage: str, what: str, done: int, total: int) -> None:
        self.progress(f"{self.part}: {stage}", what, done, total)

    def expect(self, stages: Sequence[str]) -> None:
        announce(self.progress, *(f"{self.part}: {stage}" for stage in stages))
