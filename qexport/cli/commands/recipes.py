"""`qexport recipes`: the recipes that come with the package."""

from typing import Annotated

import typer

import qexport

from ..app import MAKE, group
from ..options import Json

recipes = group("recipes", MAKE, "The recipes that come with qexport.")


@recipes("list")
def list_recipes(as_json: Json = False) -> None:
    """Name and purpose of every preset."""
    from .. import console

    presets = qexport.Recipe.presets()
    if as_json:
        console.print_json(presets)
    else:
        console.print_table(["preset", "what it is"], [list(row) for row in presets.items()])


@recipes("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Preset, scheme, or YAML file.")]) -> None:
    """A recipe with every key written out, as YAML to copy and change."""
    print(qexport.Recipe.load(name).to_yaml(), end="")
