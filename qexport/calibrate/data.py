"""The calibration data of an export: what a recipe names or a caller passes, as batches that blocks can read."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .. import ranks
from ..capture.graph import CapturedModel
from ..errors import InputError
from ..models.heads import reads_text
from ..models.source import ModelFolder
from ..models.witness import module_of
from ..plan.linear_plan import Planned
from ..progress import Progress
from ..recipe.recipe import CalibrationSpec, Recipe
from .block_activations import Stream, make_stream, module_feeds, stream_of
from .encoder_inputs import encoder_stream
from .features import feature_batches, makes_none, read_features
from .own_text import own_text
from .sources import check_source, load_samples, source_of

_PASS_TEXT = (
    "Pass a text to calibrate on: --calibration FILE, or datasets:NAME:SPLIT:COLUMN; random tokens (--calibration "
    "random) cost accuracy"
)


@dataclass(frozen=True)
class Prepared:
    """Calibration inputs of a captured module, or of a decoder of embeddings, that are ready.

    Attributes:
        batches: by public name; every row of them is real.
        described: what they are, for reports.
        own: chance made them, so that measures say little.
        counted: as `Stream` takes it.
    """

    batches: Sequence[Mapping[str, Tensor]]
    described: str
    own: bool = False
    counted: Sequence[Tensor | None] | None = None


def needs_data(recipe: Recipe, plan: Sequence[Planned]) -> bool:
    """Whether any pass will want calibration inputs."""
    elsewhere = any(method.needs_calibration and not method.of_linears for method in recipe.methods)
    return elsewhere or (recipe.needs_calibration and any(p.scheme is not None for p in plan))


def recipe_and_data(recipe: Recipe, calibration: Any) -> tuple[Recipe, Any]:
    """The recipe with the calibration source a user names, or the recipe and the data a user passes."""
    if calibration is None:
        return recipe, None
    if isinstance(calibration, (str, os.PathLike)):
        spec = recipe.calibration.model_copy(update={"source": os.fspath(calibration)})
        return recipe.model_copy(update={"calibration": spec}), None
    return recipe, calibration


def check_calibration(folder: ModelFolder, recipe: Recipe, data: Any, asked: bool) -> None:
    """Find out before the work begins that calibration text cannot be had.

    Args:
        asked: the user named the calibration, whether the recipe needs it or not.

    Raises:
        InputError: there is no tokenizer for it, or no such file.
    """
    if not asked and not recipe.needs_calibration:
        return
    if not reads_text(folder.config):
        if data is None and recipe.calibration.source == "self":
            raise makes_none("input")
        made = recipe.calibration.source == "random" or source_of(recipe.calibration).makes_features
        if data is None and not made:
            read_features(recipe.calibration.source, [])
    elif data is None:
        check_source(recipe.calibration, folder.tokenizer())
    elif isinstance(data, list | tuple):
        check_source(None, folder.tokenizer())


def check_own_text(captured: CapturedModel, recipe: Recipe, data: Any) -> None:
    """Raises InputError, before the work begins, where a model that writes no text is to calibrate on its own."""
    if data is None and recipe.calibration.source == "self" and captured.kind == "encoder":
        raise writes_none("an encoder")


def writes_none(what: str) -> InputError:
    """The error for a model that is to calibrate on text of its own, and cannot write any."""
    return InputError(f"{what} cannot write its own calibration text", place="calibration", remedy=_PASS_TEXT)


def writes_no_source(text: bool) -> InputError:
    """The error for an encoder-decoder that is to calibrate on sources of its own; text: it reads some."""
    return writes_none("an encoder-decoder") if text else makes_none("source")


def calibration_batches(
    captured: CapturedModel, recipe: Recipe, data, progress: Progress
) -> tuple[Callable[[], Stream], str]:
    """A factory of calibration streams, and what is in them.

    Raises:
        InputError: the data cannot be had, do not fit the model, or it cannot write them itself.
    """
    make, described = _batches(captured, recipe, data, progress)
    return lambda: make().multiplied_in(recipe.calibration.products), described


def _batches(captured: CapturedModel, recipe: Recipe, data, progress: Progress) -> tuple[Callable[[], Stream], str]:
    if captured.kind == "module" or isinstance(data, Prepared):
        prepared = module_inputs(captured, recipe.calibration, data, "calibration")
        return partial(stream_of, captured, prepared.batches, counted=prepared.counted), prepared.described
    spec = recipe.calibration
    encoder = captured.kind == "encoder"
    if encoder:  # a recipe's length is made for decoders
        length = min(spec.sequence_length, captured.settings.get("max_position_embeddings", spec.sequence_length))
        spec = spec.model_copy(update={"sequence_length": length})
    if data is None and spec.source == "self":
        check_own_text(captured, recipe, data)
        told = partial(progress, "calibrate")
        samples = ranks.first(partial(own_text, captured, spec, told, "the model writes its calibration text"))
    else:
        tokenizer = captured.folder.tokenizer() if captured.folder else None
        samples = load_samples(spec, data, tokenizer=tokenizer, vocab_size=captured.settings["vocab_size"])
    make = encoder_stream if encoder else make_stream
    return partial(make, captured, samples, spec.batch_size), samples.described


def module_inputs(captured: CapturedModel, spec: CalibrationSpec, data: Any, place: str) -> Prepared:
    """What a module is calibrated or compared on.

    Args:
        spec: what a folder's model reads where there are no data: a safetensors file, or chance.
        data: inputs of forward calls; of a folder's model with one input also a tensor of rows.
        place: whose they are, for errors.

    Raises:
        InputError: there are none, or they do not fit the model.
    """
    if isinstance(data, Prepared):
        return data
    made = data is None and source_of(spec).makes_features
    if captured.folder is None and not made:
        if data is None or not len(data):
            raise InputError(
                "this recipe calibrates, but an nn.Module has no text", place=place,
                remedy="Pass calibration=[(input, ...), ...], one tuple for each batch, or \"norms\" where it has some",
            )  # fmt: skip
        feeds = module_feeds(captured, data, place)
        return Prepared(feeds, f"{len(feeds)} batches given by the caller")
    if data is not None and not isinstance(data, Tensor):
        feeds = module_feeds(captured, data, place)
        return Prepared(feeds, f"{len(feeds)} batches given by the caller")
    return Prepared(*feature_batches(
        captured.inputs, spec, data, place, "rows", "rows given by the caller", module_of(captured.witness),
        captured.settings.get("vocab_size", 0),
    ))  # fmt: skip
