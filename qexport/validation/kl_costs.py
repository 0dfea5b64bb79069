"""What the linears of a deployed file really cost in KL, each by its own error."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..artifact.manifest import Manifest
from ..calibrate.fisher import Importance
from ..capture.graph import CapturedModel
from ..progress import StageProgress
from .probes import DeployedValues
from .reference import Feeds, rows_of, watch


def deployed_costs(
    folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds],
    importance: Mapping[str, Importance], *, transformed: bool, provider: str | None = None, progress: StageProgress,
) -> dict[str, float]:  # fmt: skip
    """KL in nats a token by name of the linear, as `ValueComparison.kl_cost` says it.

    Experts that are computed together have none: they make no value of their own.

    Args:
        feeds: those that the importance was found on.
        transformed: see `ValueComparison.rescaled`.
    """
    rows, costs = rows_of(feeds), {}
    deployed = DeployedValues(folder, manifest, captured, feeds, rows=rows, transformed=transformed, provider=provider)
    for index, seen in enumerate(watch(captured, feeds, set(importance), deployed.forced)):
        progress(seen.block.name, index, len(captured.blocks))
        for entry in deployed.probe.linears:
            costs[entry.name] = importance[entry.name].kl(deployed.error(entry, seen))
    progress("", len(captured.blocks), len(captured.blocks))
    return costs
