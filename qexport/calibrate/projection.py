"""What an output projection reads in the float model: its codes are wanted before any block, for the embedding."""

from dataclasses import dataclass, field
from typing import Any, Self

from ..capture.graph import CapturedModel
from ..errors import InputError
from ..graph.sites import Linear
from ..progress import StageProgress
from ..recipe.methods import WeightMethod
from .block_activations import Stream
from .handed_on import HandedOn
from .ranges import float_statistics


@dataclass
class FloatFindings:
    """What running the float model over the calibration data has found; its files are gone after the `with`.

    Attributes:
        seen: the weight method's statistic of what the output projection reads; None where nobody has looked.
        handed_on: by the blocks.
    """

    seen: Any = None
    handed_on: HandedOn = field(default_factory=HandedOn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.handed_on.forget()


def seen_by_projection(
    captured: CapturedModel, projection: Linear, stream: Stream, weights: WeightMethod,
    handed_on: HandedOn | None, progress: StageProgress,
) -> Any:  # fmt: skip
    """The weight method's statistic of what the output projection reads, over what the float model hands to it.

    Args:
        stream: calibration inputs; advanced through all float blocks.
        weights: a method that has a `table_statistic`.
        handed_on: keeps what the blocks hand on while the model is run anyway; None: nobody wants it.

    Raises:
        NumericsError: NaN or Inf in weights or activations.
    """
    if (made := captured.output_node("logits")) is None:
        raise InputError("makes no logits, so that it has no output projection", place=captured.kind)
    block, _ = made
    wanted = {block.name: {projection.input: weights.table_statistic}}

    def passed(index: int) -> None:
        if handed_on is not None:
            handed_on.note(captured, index, stream)

    found = float_statistics(captured, stream, wanted, progress, passed)
    return found[block.name][projection.input]
