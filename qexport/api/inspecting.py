"""Inspect: what an export would do, whatever kind a model is."""

import os
from typing import Any

import torch

from ..capture.dynamic import DynamicShapes
from ..capture.graph import CapturedModel
from ..capture.module import Inputs
from ..models.source import ModelFolder, with_adapter
from ..progress import Progress, no_progress
from ..recipe.recipe import Recipe
from .dry_run import dry_run
from .inspection import Inspection
from .options import Options
from .refusals import check_folder_writes
from .seq2seq.inspecting import inspect_parts
from .stages.preparing import Request, prepare
from .vision_language.inspecting import inspect_pictures


def inspect(
    model: str | os.PathLike[str] | ModelFolder | torch.nn.Module | CapturedModel,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    target: str = "cpu",
    dtype: str | None = None,
    calibrate: bool = False,
    calibration: Any = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    seed: int | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
    attention: str = "grouped",
    progress: Progress = no_progress,
    device: str = "cpu",
    offload: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    form: str = "native",
    opset: int | None = None,
) -> Inspection:
    """Say what `export` would do with the same arguments, without reading a weight unless it calibrates.

    Decisions that depend on ranges of activations are open without calibration. With it the float model is run, one
    block in memory at a time. An export sees every block behind quantized ones instead, so that a range close to a
    bound of the policy may fall on its other side there.

    Args:
        model: as `export` takes it.
        recipe: as `export` takes it.
        target: as `export` takes it.
        dtype: as `export` takes it.
        calibrate: run calibration data through the model for the ranges of quantized activations; not of an
            encoder-decoder.
        calibration: the data, as `export` takes it; None takes what the recipe says. Giving it implies `calibrate`.
        example_inputs: as `export` takes them.
        dynamic_shapes: as `export` takes them.
        seed: as `export` takes it.
        requantize: as `export` takes it.
        trust_remote_code: run Python code that comes with the model.
        attention: as `export` takes it.
        progress: called with (stage, what, done, total) while calibrating.
        device: as `export` takes it.
        offload: as `export` takes it.
        adapter: as `export` takes it.
        form: as `export` takes it.
        opset: as `export` takes it.

    Raises:
        QExportError: as `export`, for everything that shows before weights are quantized; that weights are beyond the
            range of float16 shows when it calibrates.
    """
    model = with_adapter(model, adapter, trust_remote_code)
    options = Options(
        target=target, dtype=dtype, attention=attention, seed=seed, requantize=requantize,
        trust_remote_code=trust_remote_code, progress=progress, device=device, offload=offload,
        form=form, opset=opset,
    )  # fmt: skip
    prepared = prepare(Request.of(model, recipe, options, calibration, example_inputs, dynamic_shapes))
    calibrate = calibrate or calibration is not None
    if prepared.in_three_parts:
        return inspect_pictures(prepared, calibrate)
    if prepared.in_two_parts:
        return inspect_parts(prepared, calibrate)
    if calibrate:
        check_folder_writes(prepared)
    return dry_run(prepared, calibrate)
