"""How long work tells its caller how far it is."""

from collections.abc import Callable

Progress = Callable[[str, str, int, int], None]
"""Called with the stage, what is being done, how many are done, how many there are."""

StageProgress = Callable[[str, int, int], None]
"""The same within a stage, which whoever calls it knows: `partial(progress, "quantize")`."""


def no_progress(stage: str, what: str, done: int, total: int) -> None:
    """A `Progress` that nobody looks at."""


def no_stage_progress(what: str, done: int, total: int) -> None:
    """A `StageProgress` that nobody looks at."""


def of_part(progress: Progress, part: str) -> Progress:
    """The progress of a part of a model, as part of the whole's."""
    return lambda stage, what, done, total: progress(f"{part}: {stage}", what, done, total)
