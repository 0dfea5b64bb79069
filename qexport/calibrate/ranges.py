"""Statistics of the float model's activations on calibration data, one block in memory at a time."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from ..capture.graph import CapturedModel
from ..errors import within
from ..progress import StageProgress, no_stage_progress
from ..quant.observers import AbsmaxObserver
from .block_activations import Stream, collect
from .float_model import weights_of
from .memory import trim


def float_ranges(
    captured: CapturedModel,
    stream: Stream,
    wanted: Mapping[str, list[Node]],
    progress: StageProgress = no_stage_progress,
) -> dict[str, dict[Node, float]]:
    """The largest magnitude of values of the float model, over the real tokens of all batches.

    Args, raises: as `float_statistics`; wanted: by block name, the values asked about.
    """
    asked = {block: dict.fromkeys(values, AbsmaxObserver) for block, values in wanted.items()}
    seen = float_statistics(captured, stream, asked, progress)
    return {b: {value: statistic.absmax() for value, statistic in found.items()} for b, found in seen.items()}


def float_statistics(
    captured: CapturedModel,
    stream: Stream,
    wanted: Mapping[str, Mapping[Node, Callable[[], Any]]],
    progress: StageProgress = no_stage_progress,
    passed: Callable[[int], None] = lambda index: None,
) -> dict[str, dict[Node, Any]]:
    """Show values of the float model to statistics, the real tokens of all batches.

    Args:
        captured: weights are loaded block by block and dropped again; the graphs stay as they are.
        stream: calibration inputs; advanced on the way.
        wanted: by block name and value, a factory of an object with `update(x)`. Blocks behind the last of them are not
            run.
        progress: called with (block name, blocks done, blocks in all).
        passed: called with the place of every block that the stream has passed.

    Returns:
        by block name and value, the object.

    Raises:
        NumericsError: NaN or Inf in weights or activations.
    """
    last = max((i for i, block in enumerate(captured.blocks) if wanted.get(block.name)), default=-1)
    found: dict[str, dict[Node, Any]] = {}
    for index, block in enumerate(captured.blocks[: last + 1]):
        progress(block.name, index, last + 1)
        with within(block.name), weights_of(captured, block):
            if asked := wanted.get(block.name):
                found[block.name] = collect(block, stream, block.module, asked)
            if index < last:
                stream.advance(block, index)
                passed(index)
        trim()
    progress("", last + 1, last + 1)
    return found
