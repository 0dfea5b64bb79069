"""The passes over a whole model that a recipe asks for, before its blocks are quantized one by one."""

from ..capture.graph import CapturedModel
from ..errors import PassError
from ..passes.model.base import ModelPass, ModelResult
from ..recipe.methods import ModelMethod
from ..recipe.recipe import Recipe


def model_passes_for(recipe: Recipe) -> list[tuple[str, ModelPass]]:
    """In the order in which they run, each with the key of the recipe that asks for it."""
    methods = [method for method in recipe.methods if isinstance(method, ModelMethod)]
    return [(method.key, step) for method in methods for step in method.model_passes()]


def change_model(captured: CapturedModel, recipe: Recipe) -> dict[str, ModelResult]:
    """Run them on a captured model, unless that has been done; by the name of the pass, what it did.

    The model computes what it did: `validation.reader.check_reader` compares the changed graph with the witness.

    Raises:
        PassError: a pass cannot work on this model, and why.
    """
    if captured.changed:
        return {}
    found = {}
    for key, step in model_passes_for(recipe):
        try:
            found[step.name] = step.call(captured)
        except PassError as error:
            raise PassError(error.message, place=key, remedy=f"Remove {key} from the recipe") from None
    captured.changed = bool(found)
    return found
