import pytest

from helpers import agreement


@pytest.fixture
def export(captured, tmp_path):
    """export(family, recipe, target="cpu", single=False, **options): a new export and its graph, see `agreement`."""

    def make(family, recipe, target="cpu", single=False, **options):
        out = tmp_path / f"export{len(list(tmp_path.iterdir()))}"
        return agreement.export(captured(family), recipe, target, out, single, **options)

    return make
