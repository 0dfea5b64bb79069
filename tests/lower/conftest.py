import pytest

from helpers import agreement


@pytest.fixture(scope="module")
def new_export(captured, tmp_path_factory):
    """new_export(family, recipe, target="cpu", single=False, **options): an export and its graph, see `agreement`."""

    def make(family, recipe, target="cpu", single=False, **options):
        folder = tmp_path_factory.mktemp("exports") / family
        return agreement.export(captured(family), recipe, target, folder, single, **options)

    return make


@pytest.fixture(scope="module")
def export(new_export):
    """export(...): the same, made once in a file for whoever asks for the same; read only, and nothing patched."""
    made = {}

    def make(family, recipe, target="cpu", single=False, **options):
        asked = family, recipe.to_yaml(), target, single, *sorted(options.items())
        if asked not in made:
            made[asked] = new_export(family, recipe, target, single, **options)
        return made[asked]

    return make
