import pytest

from helpers import agreement


@pytest.fixture(scope="module")
def export(captured, tmp_path_factory):
    """export(family, recipe, target="cpu", single=False, **options): an export and its graph, see `agreement`.

    Made once for a file of tests: it is read only.
    """
    made = {}

    def make(family, recipe, target="cpu", single=False, **options):
        asked = family, recipe.to_yaml(), target, single, *sorted(options.items())
        if asked not in made:
            folder = tmp_path_factory.mktemp("exports") / family
            made[asked] = agreement.export(captured(family), recipe, target, folder, single, **options)
        return made[asked]

    return make
