"""`qexport recipes`: the recipes that come with the package."""

from typing import Annotated

import typer

import qexport

from ..app import MAKE, group
from ..options import Json

recipes = group("recipes", MAKE, "The recipes that come with qexport.")


@recipes("list")
def list_recipes(as_json: Json = False) -> None:
    """What users want, in the order of size, then the presets of single methods and papers."""
    from ...recipe.catalogue import WISHES, descriptions
    from .. import console

    what = descriptions()
    if as_json:
        console.print_json(what)
        return
    columns = ["for", "preset", "size of float16", "speed of float32", "calibration", "what it is"]
    console.print_table(
        columns, [[w.name, w.preset, w.size, w.speed, w.calibration, what[w.preset]] for w in WISHES]
    )  # fmt: skip
    print("\nSpeed: of prompts and of single tokens of SmolLM2-135M on a CPU, else of whole runs.")
    print("Without --recipe it is balanced.")
    print("\nBy scheme and by method, as papers have them:\n")
    wanted = {wish.preset for wish in WISHES} - {"w8a8_static"}
    console.print_table(["preset", "what it is"], [[name, text] for name, text in what.items() if name not in wanted])


@recipes("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Preset, scheme or YAML file.")]) -> None:
    """A recipe with every key written out, as YAML to copy and change."""
    print(qexport.Recipe.load(name).to_yaml(), end="")
