"""What a rounded table of embeddings costs the float model by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..capture.graph import CapturedModel, WeightSource
from ..progress import StageProgress, no_stage_progress
from ..quant.metrics import kl_divergence
from .reference import Feeds, FloatOutputs


def table_cost(
    captured: CapturedModel, weight: str, table: Tensor, feeds: Sequence[Feeds], real: Sequence[Tensor | None],
    progress: StageProgress = no_stage_progress,
) -> float:  # fmt: skip
    """The mean KL in nats a token from the float model to itself with another table; nothing else is rounded.

    An output projection that is the same tensor reads the other table too. Logits of all feeds are in memory.

    Args:
        captured: a decoder.
        weight: name of the table's tensor; table: what takes its place, [V, K].
        feeds: the model's inputs by public name, one dict for each batch.
        real: for each batch which tokens count, [batch, sequence] bool; None for all.
    """
    wanted = _logits(captured, feeds, progress)
    other = replace(captured.copy(), weights=_WithTable(captured.weights, weight, table))
    found = _logits(other, feeds, progress)
    pairs = zip(wanted, found, real, strict=True)
    costs = [_costs(want, got, tokens) for want, got, tokens in pairs]
    return float(torch.cat(costs).mean())


def _logits(captured: CapturedModel, feeds: Sequence[Feeds], progress: StageProgress) -> list[Tensor]:
    outputs = FloatOutputs(captured, feeds, ("logits",), progress)
    try:
        return [outputs.outputs(batch)["logits"] for batch in range(len(feeds))]
    finally:
        outputs.close()


def _costs(want: Tensor, got: Tensor, tokens: Tensor | None) -> Tensor:
    cost = kl_divergence(want.flatten(0, -2), got.flatten(0, -2))
    return cost if tokens is None else cost[tokens.flatten().to(cost.device)]


@dataclass(frozen=True)
class _WithTable:
    weights: WeightSource
    name: str
    table: Tensor

    def load(self, name: str) -> Tensor:
        return self.table if name == self.name else self.weights.load(name)
