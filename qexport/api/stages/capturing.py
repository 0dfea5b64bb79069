"""Second stage: the model as a graph without weights, in blocks, after the passes over the whole of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...calibrate.model_passes import change_model
from ...capture.dynamic import DynamicShapes
from ...capture.folder import capture_folder
from ...capture.graph import CapturedModel
from ...capture.module import Inputs, capture_module
from ...device import HOST, Placement
from ...errors import InputError
from ...passes.base import log_sites
from ...passes.model.base import ModelResult
from .preparing import Model, Preparation, opened, timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Capture(Preparation):
    """A `Preparation`, and the model as a graph.

    Attributes:
        captured: the model; later stages change its blocks.
        changes: what passes over the whole model did, by their names.
    """

    captured: CapturedModel
    changes: Mapping[str, ModelResult]


@timed
def capture(prepared: Preparation) -> Capture:
    """Capture a model and change it as a whole.

    Raises:
        CaptureError: it cannot be followed.
        PassError: a pass over the whole model cannot work on this one.
    """
    source, progress = prepared.source, prepared.options.progress
    progress("capture", "the model as a graph", 0, 1)
    captured = capture_model(
        source, prepared.example_inputs, prepared.dynamic_shapes, placement=prepared.options.placement
    )
    if not isinstance(source, CapturedModel):
        for note in captured.notes:
            logger.warning("%s", note)
    logger.info("captured as %s, in %d blocks", captured.kind, len(captured.blocks))
    if captured.kind == "decoder":
        _shorten(captured, prepared.options.max_length)
    changes = change_model(captured, prepared.recipe)
    for name, result in changes.items():
        log_sites("the whole model", name, result.changed, result.skipped)
    progress("capture", "the model as a graph", 1, 1)
    return Capture(**vars(prepared), captured=captured, changes=changes)


def _shorten(captured: CapturedModel, longest: int | None) -> None:
    """Let a decoder read texts of so many tokens at most, and its tables of positions have no more rows.

    Raises:
        InputError: it reads no such long ones.
    """
    if longest is None:
        return
    context = captured.settings.get("max_position_embeddings", longest)
    if longest > context:
        raise InputError(
            f"the model reads at most {context} tokens, not {longest}", place="max_length", remedy="Use a smaller one"
        )
    captured.settings["max_position_embeddings"] = longest


def capture_model(
    model: Model,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    trust_remote_code: bool = False,
    placement: Placement = HOST,
) -> CapturedModel:
    """Capture whatever a user passes as a model (see `export`), or copy what is captured already.

    Args:
        placement: where its blocks are to be computed.
    """
    source = opened(model, trust_remote_code=trust_remote_code)
    if isinstance(source, CapturedModel):
        captured = source.copy()
    elif not isinstance(source, torch.nn.Module):
        captured = capture_folder(source)
    elif example_inputs is None:
        raise InputError("an nn.Module needs example_inputs", remedy="Pass the tensors of one forward call")
    else:
        captured = capture_module(source, example_inputs, dynamic_shapes)
    captured.placement = placement
    return captured
