"""Which recipe a command line means."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import qexport

from ..errors import InputError

if TYPE_CHECKING:
    from ..api.stages.preparing import Model


def named_recipe(recipe: str | None, requantize: str | None) -> "qexport.Recipe | None":
    """The recipe that an option names; None where neither does.

    Raises:
        InputError: both do.
        RecipeError: there is no such recipe.
    """
    if recipe is not None and requantize is not None:
        raise InputError("--requantize and --recipe both name a recipe", remedy="Give one of them")
    name = recipe or requantize
    return None if name is None else qexport.Recipe.load(name)


def adapters_of(given: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    """The adapter that is merged, and those that stay apart by their names.

    Raises:
        InputError: two are to be merged, or two have one name.
    """
    named = [entry.partition("=")[::2] for entry in given if "=" in entry and not Path(entry).is_dir()]
    alone = [entry for entry in given if "=" not in entry or Path(entry).is_dir()]
    kept = dict(named)
    if len(alone) > 1 or len(kept) < len(named):
        raise InputError("one adapter can be merged; those that are kept apart need names",
                         place="--adapter", remedy="Give NAME=DIR for each")  # fmt: skip
    return (Path(alone[0]) if alone else None), kept


def with_recipe(
    model: str, named: "qexport.Recipe | None", trust_remote_code: bool, adapter: Path | None = None
) -> "tuple[Model, qexport.Recipe]":
    """The model, opened where it has an adapter or that is needed to know what recipe is meant, and the recipe."""
    if adapter is not None:
        from ..api.stages.preparing import default_recipe
        from ..models.source import with_adapter

        opened_model = with_adapter(model, adapter, trust_remote_code)
        return opened_model, named or default_recipe(opened_model)
    if named is not None:
        return model, named
    from ..api.stages.preparing import default_recipe, opened

    source = opened(model, trust_remote_code=trust_remote_code)
    return source, default_recipe(source)
