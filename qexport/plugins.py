"""Modules that register what they declare when they are imported: those of a folder, and those that packages bring."""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from .errors import RecipeError


def import_folder(package: str) -> None:
    """Import every module of a package, by its dotted name; not those of packages in it."""
    path = import_module(package).__path__
    for found in iter_modules(path, f"{package}."):
        if not found.ispkg:
            import_module(found.name)


def import_plugins(group: str, what: str) -> None:
    """Import every module that a package names under an entry-point group.

    Args:
        what: they bring, for errors.

    Raises:
        RecipeError: names the module that cannot be imported.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:
            raise RecipeError(
                f"its {what} cannot be imported: {type(error).__name__}: {error}", place=point.value,
                remedy="Repair or uninstall the package",
            ) from error  # fmt: skip
