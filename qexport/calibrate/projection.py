"""What an output projection reads in the float model: its codes are wanted before any block, for the embedding."""

import torch

from ..capture.graph import CapturedModel
from ..graph.sites import Linear
from ..passes.weights.gptq import hessian_statistic
from ..quant.gptq import HessianStatistic
from ..recipe.sections import WeightSpec
from .block_activations import Stream
from .ranges import Progress, float_statistics


def hessian_of(
    captured: CapturedModel, projection: Linear, stream: Stream, given: WeightSpec, progress: Progress
) -> torch.Tensor:
    """The Hessian [K, K] of the output projection on what the float model hands to it.

    Args:
        stream: calibration inputs; advanced through all float blocks.
        given: how tokens are weighed.

    Raises:
        NumericsError: NaN or Inf in weights or activations.
    """
    block, _ = captured.made("logits")
    wanted = {block.name: {projection.input: lambda: hessian_statistic(given.token_norm_power)}}
    found: HessianStatistic = float_statistics(captured, stream, wanted, progress)[block.name][projection.input]
    return found.value()
