"""The passes over a whole model that a recipe asks for, before its blocks are quantized one by one."""

from ..capture.graph import CapturedModel
from ..errors import PassError
from ..passes.model.base import ModelPass, ModelResult
from ..passes.model.rotation import RotateResidual
from ..recipe.recipe import Recipe


def model_passes_for(recipe: Recipe) -> list[ModelPass]:
    """In the order in which they run."""
    return [] if recipe.rotation is None else [RotateResidual(recipe.rotation.seed)]


def change_model(captured: CapturedModel, recipe: Recipe) -> dict[str, ModelResult]:
    """Run them on a captured model, unless that has been done; by the name of the pass, what it did.

    The model computes what it did: `validation.reader.check_reader` compares the changed graph with the witness.

    Raises:
        PassError: a pass cannot work on this model, and why.
    """
    if captured.basis:
        return {}
    found = {}
    for step in model_passes_for(recipe):
        try:
            found[step.name] = step.call(captured)
        except PassError as error:
            raise PassError(error.message, place="rotation", remedy="Remove rotation from the recipe") from None
    return found
