"""The float model writes the text that it is calibrated or measured on."""

from functools import partial
from typing import Any

import torch

from ..artifact.cache_names import is_past, is_state
from ..capture.graph import CapturedModel
from ..progress import StageProgress
from ..recipe.recipe import CalibrationSpec
from .float_model import float_bytes, stepping
from .self_text import Step, continue_text
from .sources import Samples, load_samples

# Texts that are written side by side: a step of a small model costs hardly more for 16 than for one. One of a large
# model is as long as its weights take to be read, and takes as many texts as the caches leave room for. What is large
# is no matter of the memory that is free, as the texts depend on how many are written together.
_TOGETHER, _LARGE, _CACHES = 16, 8e9, 2e9  # the last two in bytes


def own_text(captured: CapturedModel, spec: CalibrationSpec, progress: StageProgress, what: str) -> Samples:
    """Text that a decoder writes, whatever its size.

    Args:
        spec: how much, and the seed.
        what: is done, for progress.

    Raises:
        InputError: a block does not fit into memory.
        NumericsError: the model writes NaN.
    """
    together = _together(captured, spec)
    steps = -(-spec.samples // together) * spec.sequence_length  # a few fewer: texts begin with more than nothing
    with stepping(captured) as step:
        samples = load_samples(
            spec, tokenizer=captured.folder.tokenizer() if captured.folder else None,
            vocab_size=captured.settings["vocab_size"], together=together,
            generate=partial(continue_text, _counted(step, partial(progress, what), steps)),
        )  # fmt: skip
    progress(what, steps, steps)
    return samples


def _together(captured: CapturedModel, spec: CalibrationSpec) -> int:
    if float_bytes(captured) <= _LARGE:
        return _TOGETHER
    caches = [port for port in captured.inputs if is_past(port.name) and not is_state(port.name)]
    features = sum(port.empty(1).shape[1] * port.empty(1).shape[3] for port in caches)
    return min(spec.samples, max(_TOGETHER, int(_CACHES // (4 * max(features, 1) * spec.sequence_length))))


def _counted(step: Step, progress: Any, steps: int) -> Step:
    done = 0

    def counted(ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        nonlocal done
        progress(done, steps)
        done += 1
        return step(ids, past)

    return counted
