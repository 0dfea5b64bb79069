import sys

import pytest

from helpers.report_folders import full_report, plain_report, write_validated
from qexport.errors import InputError
from qexport.report import render
from qexport.report.png import write_plots


@pytest.mark.slow
def test_every_figure_becomes_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    exported = write_validated(tmp_path, full_report())
    files = write_plots(exported, tmp_path / "new" / "plots")
    assert sorted(f.stem for f in files) == [
        "cost", "depth", "greedy", "map_cost", "map_inherited", "map_own", "margin", "position", "range_0", "range_1",
    ]  # fmt: skip
    for file in files:
        image = imread(file)
        assert image.shape[0] > 100 and image[..., :3].std() > 0.02, "something is drawn"
    first = files[0].read_bytes()
    assert write_plots(exported, tmp_path / "new" / "plots")[0].read_bytes() == first


def test_names_are_no_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    report = plain_report()
    rows = tuple(row.model_copy(update=dict(name=row.name + "$x_{")) for row in report.layers.linears)
    layers = report.layers.model_copy(update=dict(linears=rows))
    assert write_plots(write_validated(tmp_path, report.model_copy(update=dict(layers=layers))), tmp_path / "plots")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    write_validated(tmp_path, plain_report())
    with pytest.raises(InputError, match=r"pip install 'qexport\[plots\]'"):
        render(tmp_path, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    pytest.importorskip("matplotlib")
    exported = write_validated(tmp_path, plain_report())
    with pytest.raises(InputError, match="is a file, not a folder"):
        write_plots(exported, tmp_path / "recipe.yaml")
