"""Ranges of the float model's activations on calibration data, one block in memory at a time."""

from collections.abc import Callable, Mapping

from torch.fx import Node

from ..capture.graph import Captured
from ..errors import within
from ..numerics.observers import AbsmaxObserver
from .float_model import weights_of
from .memory import trim
from .streams import Stream, collect


def float_ranges(
    captured: Captured,
    stream: Stream,
    wanted: Mapping[str, list[Node]],
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, dict[Node, float]]:
    """The largest magnitude of values of the float model, over the real tokens of all batches.

    Args:
        captured: weights are loaded block by block and dropped again; the graphs stay as they are.
        stream: calibration inputs; advanced on the way.
        wanted: by block name, the values asked about. Blocks behind the last of them are not run.
        progress: called with (block name, blocks done, blocks in all).

    Returns:
        by block name and value.

    Raises:
        NumericsError: NaN or Inf in weights or activations.
    """
    last = max((i for i, block in enumerate(captured.blocks) if wanted.get(block.name)), default=-1)
    found: dict[str, dict[Node, float]] = {}
    for index, block in enumerate(captured.blocks[: last + 1]):
        progress(block.name, index, last + 1)
        with within(block.name), weights_of(captured, block):
            asked = dict.fromkeys(wanted.get(block.name, ()), AbsmaxObserver)
            if asked:
                seen = collect(block, stream, block.module, asked)
                found[block.name] = {value: statistic.absmax() for value, statistic in seen.items()}
            if index < last:
                stream.advance(block, index)
        trim()
    progress("", last + 1, last + 1)
    return found
