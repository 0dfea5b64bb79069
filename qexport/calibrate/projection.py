"""What an output projection reads in the float model: its codes are wanted before any block, for the embedding."""

from typing import Any

from ..capture.graph import CapturedModel
from ..errors import InputError
from ..graph.sites import Linear
from ..progress import StageProgress
from ..recipe.methods import WeightMethod
from .block_activations import Stream
from .ranges import float_statistics


def seen_by_projection(
    captured: CapturedModel, projection: Linear, stream: Stream, weights: WeightMethod, progress: StageProgress
) -> Any:
    """The weight method's statistic of what the output projection reads, over what the float model hands to it.

    Args:
        stream: calibration inputs; advanced through all float blocks.
        weights: a method that has a `table_statistic`.

    Raises:
        NumericsError: NaN or Inf in weights or activations.
    """
    if (made := captured.output_node("logits")) is None:
        raise InputError("makes no logits, so it has no output projection", place=captured.kind)
    block, _ = made
    wanted = {block.name: {projection.input: weights.table_statistic}}
    return float_statistics(captured, stream, wanted, progress)[block.name][projection.input]
