"""What other packages bring: modules that their metadata names, which register what they declare when imported."""

from importlib.metadata import entry_points

from .errors import RecipeError


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
