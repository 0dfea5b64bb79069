"""First stage: everything that a user names is found, and what cannot work is refused before work begins."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from ...calibrate.data import check_calibration, recipe_and_data
from ...calibrate.projection import FloatFindings
from ...capture.dynamic import DynamicShapes
from ...capture.graph import CapturedModel
from ...capture.module import Inputs
from ...errors import InputError
from ...models.coded import CodedCheckpoint
from ...models.heads import in_two_parts
from ...models.source import ModelFolder, open_model
from ...models.vision_language import in_three_parts
from ...recipe.recipe import Recipe
from ...targets.base import Target, target_for
from ..options import Options

DEFAULT = "balanced"

logger = logging.getLogger(__name__)

Model = str | os.PathLike[str] | ModelFolder | torch.nn.Module | CapturedModel
Source = ModelFolder | torch.nn.Module | CapturedModel


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for.

    Attributes:
        model: as `export` takes it.
        recipe: what to do to it.
        target: what for.
        calibration: as `export` takes it.
        example_inputs: of an nn.Module.
        dynamic_shapes: of an nn.Module.
        options: all else.
    """

    model: Model
    recipe: Recipe
    target: Target
    calibration: Any = None
    example_inputs: Inputs | None = None
    dynamic_shapes: DynamicShapes | None = None
    options: Options = Options()

    @classmethod
    def of(
        cls,
        model: Model,
        recipe: str | os.PathLike[str] | Recipe | None,
        options: Options,
        calibration: Any = None,
        example_inputs: Inputs | None = None,
        dynamic_shapes: DynamicShapes | None = None,
    ) -> "Request":
        """Find the recipe and the target by their names; without a recipe the model says which it is.

        Raises:
            QExportError: there is no such recipe or target, or they do not go together.
        """
        if recipe is None:
            model = opened(model, trust_remote_code=options.trust_remote_code)
            recipe = default_recipe(model)
        found = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        if options.seed is not None:
            found = found.with_calibration(seed=options.seed)
        return cls(
            model=model, recipe=found, options=options,
            target=target_for(options.target, found, options.dtype, options.operators),
            calibration=calibration, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What an export works with.

    Attributes:
        source: the model, opened where it is on disk.
        recipe: what to do to it, with the calibration source that the user named.
        target: what for.
        data: calibration data that the user passed; None takes what the recipe names.
        asked: the user named the calibration, whether the recipe needs it or not.
        example_inputs: of an nn.Module.
        dynamic_shapes: of an nn.Module.
        options: all else.
        seconds: by stage, what it took; filled on the way.
        findings: of the float model on the calibration data; exports with the same data and ways of finding weights
            share them, and one that is alone makes its own.
    """

    source: Source
    recipe: Recipe
    target: Target
    data: Any = None
    asked: bool = False
    example_inputs: Inputs | None = None
    dynamic_shapes: DynamicShapes | None = None
    options: Options = Options()
    seconds: dict[str, float] = field(default_factory=dict)
    findings: FloatFindings | None = None

    @property
    def in_two_parts(self) -> bool:
        """Whether it is an encoder-decoder, which becomes two exports in one folder."""
        return isinstance(self.source, ModelFolder) and in_two_parts(self.source.config)

    @property
    def in_three_parts(self) -> bool:
        """Whether it is a model of pictures and text, which becomes three exports in one folder."""
        return isinstance(self.source, ModelFolder) and in_three_parts(self.source.config)

    def of_part(self, captured: CapturedModel, recipe: Recipe, options: Options) -> "Preparation":
        """The same for a part of the model that is captured already, its time measured apart."""
        return replace(self, source=captured, recipe=recipe, options=options, seconds={})


Rest = ParamSpec("Rest")
Before = TypeVar("Before")
After = TypeVar("After", bound=Preparation)


def timed(
    stage: Callable[Concatenate[Before, Rest], After],
) -> Callable[Concatenate[Before, Rest], After]:
    """A stage that notes in its result what it took, under its name."""

    @wraps(stage)
    def run(before: Before, *args: Rest.args, **kwargs: Rest.kwargs) -> After:
        started = time.perf_counter()
        after = stage(before, *args, **kwargs)
        after.seconds[stage.__name__] = time.perf_counter() - started
        return after

    return run


@timed
def prepare(request: Request) -> Preparation:
    """Open a model on disk, after a look for the texts that calibrate it.

    Raises:
        InputError: there is no such model, no text, or an option that means nothing for it.
    """
    recipe, data = recipe_and_data(request.recipe, request.calibration)
    source = opened(request.model, trust_remote_code=request.options.trust_remote_code)
    _check_codes(source, recipe, request.options)
    asked = request.calibration is not None
    if not isinstance(source, torch.nn.Module):
        for name in ("example_inputs", "dynamic_shapes"):
            if getattr(request, name) is not None:
                raise InputError("only an nn.Module takes them", place=name, remedy="Leave them out")
    prepared = Preparation(
        source=source, recipe=recipe, target=request.target, data=data, asked=asked, options=request.options,
        example_inputs=request.example_inputs, dynamic_shapes=request.dynamic_shapes,
    )  # fmt: skip
    if isinstance(source, ModelFolder) and not prepared.in_two_parts and not prepared.in_three_parts:
        check_calibration(source, recipe, data, asked)
    return prepared


def default_recipe(source: Source) -> Recipe:
    """The recipe that is meant without one: of a model that is quantized already, what keeps its codes.

    A module of one's own has no table that is read by token ids, as far as anybody knows before it is captured.
    """
    if (codes := _codes_of(source)) is not None:
        return Recipe.keeping_codes(codes.cache_numbers)
    return Recipe.load("w4a16_g32" if isinstance(source, torch.nn.Module) else DEFAULT)


def _codes_of(source: Source) -> CodedCheckpoint | None:
    """How the weights of a model are kept as codes; None where they are float."""
    folder = source.folder if isinstance(source, CapturedModel) else source
    return folder.codes if isinstance(folder, ModelFolder) else None


def _check_codes(source: Source, recipe: Recipe, options: Options) -> None:
    """Codes are kept or given up where the user says so, never by accident.

    Raises:
        InputError: the recipe would give them up, there are none to give up, or passes change weights that are kept.
    """
    codes, requantize = _codes_of(source), options.requantize
    if codes is None and requantize:
        raise InputError("its weights are float", place="requantize", remedy="Pass the recipe without it")
    if codes is not None and not requantize and not recipe.weights.keeps_codes:
        raise InputError(
            f"its weights are codes already ({codes.described}), which {recipe.name} would replace", place=str(source),
            remedy=f"Leave out the recipe to keep them, or requantize with {recipe.name}, which goes through float",
        )  # fmt: skip
    if codes is not None and recipe.weights.keeps_codes and options.extra_passes:
        raise InputError(
            f"{recipe.name} keeps codes whatever passes make of the float weights", place="extra_passes",
            remedy="Leave them out, or requantize",
        )  # fmt: skip
    if codes is not None and requantize and recipe.weights.keeps_codes:
        raise InputError(f"{recipe.name} keeps the codes of a checkpoint", place="requantize", remedy="Leave it out")


def opened(model: Model, *, trust_remote_code: bool = False) -> Source:
    """What a user passes, a model on disk opened, with a warning for whatever an export of it will go without."""
    if isinstance(model, torch.nn.Module | CapturedModel):
        return model
    if not isinstance(model, str | os.PathLike | ModelFolder):
        raise InputError(
            f"a {type(model).__name__} is no model", remedy="Pass a folder, a Hugging Face id or the nn.Module itself"
        )
    folder = open_model(model, trust_remote_code=trust_remote_code)
    if folder is not model:  # otherwise they were said when it was opened
        for note in folder.notes:
            logger.warning("%s", note)
    return folder
