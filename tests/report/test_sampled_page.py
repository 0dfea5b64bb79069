"""A study on the page of an export: curves are the study's numbers, the own line stands out, bad files are refused."""

import json
from xml.etree import ElementTree

import pytest

from helpers.report_folders import a_study, full_report, write_validated
from qexport.errors import InputError
from qexport.report import render, svg
from qexport.report.html import render_html
from qexport.report.sampling import read_study, sampled

HOSTILE = """</script><img src=x onerror=alert(1)>"'&"""


@pytest.fixture
def exported(tmp_path):
    return write_validated(tmp_path / "mine", full_report())


def test_a_line_a_format_over_temperature_and_the_own_one_stands_out(exported):
    distance, perplexity, repetition = sampled(a_study(temperatures=(1.0, 0.0, 0.5)), exported.folder).figures
    assert [(s.name, s.quiet) for s in distance.series] == [("mine", False), ("other", True)], "float is 0 from itself"
    assert [(p.x, p.y, p.error) for p in distance.series[0].points] == [
        (0.0, 0.1, 0.02), (0.5, pytest.approx(0.105), 0.02), (1.0, pytest.approx(0.11), 0.02),
    ]  # fmt: skip
    assert distance.series[0].points[2].title == "mine at 1: 0.110 ± 0.020"
    assert [s.name for s in perplexity.series] == [s.name for s in repetition.series] == ["mine", "other", "float"]
    assert [s.points[0].y for s in perplexity.series] == [2.0, 3.0, 1.0]


def test_the_longest_texts_and_each_top_k_with_the_likeliest_token_in_all(exported):
    found = sampled(a_study(top_ks=(0, 5), lengths=(4, 8)), exported.folder)
    assert [f.key for f in found.figures] == [
        f"sampling_{what}_{k}" for k in ("k0", "k5") for what in ("distance", "perplexity", "repetition")
    ]
    assert found.figures[0].title.endswith("top-k off") and found.figures[3].title.endswith("top-k 5")
    assert [p.y for p in found.figures[3].series[0].points] == [0.1, pytest.approx(0.115)]
    assert (
        "up to 8 new tokens" in found.intro[0] and found.intro[-1] == "Measured too, and not drawn: texts of 4 tokens."
    )


def test_top_ks_that_are_too_many_are_named(exported):
    found = sampled(a_study(top_ks=(1, 2, 3, 4, 5)), exported.folder)
    assert len(found.figures) == 9 and found.intro[-1] == "Measured too, and not drawn: top-k 4, 5."


def test_greedy_texts_alone(exported):
    found = sampled(a_study(temperatures=(0.0,), top_ks=(0, 50)), exported.folder)
    assert [f.title for f in found.figures][0] == "Distance from the float model"
    assert all("nan" not in svg.lines(f) for f in found.figures)


def test_what_has_no_number_breaks_the_line_or_has_no_figure(exported):
    study = a_study()
    rows = tuple(
        row.model_copy(update=dict(repetition=None, distance=None if row.temperature else 0.3, distance_error=None))
        for row in study.rows
    )
    distance, perplexity = sampled(study.model_copy(update=dict(rows=rows)), exported.folder).figures
    first, last = distance.series[0].points
    assert (first.y, first.error, last.y) == (0.3, 0.0, None) and last.title == "mine at 1: no number"


def test_conclusions_about_others_are_apart(exported):
    names = ("mine", "mine_kv8", "other")
    told = ("temperature 0: smallest is other; mine is clearly closer", "mine, top-k off: a", "mine_kv8, top-k 5: b")
    found = sampled(a_study(names, conclusions=told), exported.folder)
    assert found.conclusions == told[:2] and found.others == told[2:]


def test_an_export_that_is_not_in_the_study(exported):
    found = sampled(a_study(("a", "b")), exported.folder)
    assert found.intro[1] == "This export is not among its formats." and len(found.conclusions) == 2
    assert all(s.quiet for f in found.figures for s in f.series)


def test_an_export_that_was_made_again_since(exported):
    (exported.folder / "model.onnx").write_bytes(b"x" * 7)
    found = sampled(a_study(), exported.folder)
    assert "another size" in found.intro[1] and all(s.quiet for s in found.figures[0].series)


def test_of_two_folders_of_one_name_the_place_decides(exported, monkeypatch):
    study = a_study(("/elsewhere/mine", str(exported.folder)))
    assert sampled(study, exported.folder).figures[0].series[1].quiet is False


def test_many_lines_keep_their_names_apart(exported):
    names = ("mine", *(f"format {i}" for i in range(15)))
    study = a_study(names)
    rows = tuple(row.model_copy(update=dict(distance=0.2)) for row in study.rows)
    distance = sampled(study.model_copy(update=dict(rows=rows)), exported.folder).figures[0]
    image = ElementTree.fromstring(str(svg.lines(distance)))
    written = [e for e in image.iter("text") if e.get("class") == "end-name"]
    heights = sorted(float(e.get("y")) for e in written)
    height = float(image.get("viewBox").split()[3])
    assert len(written) == 16 and min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 9
    assert heights[0] > 10 and heights[-1] < height - 20
    assert image[-1].get("class") == "series line0", "the own line lies on top"


def test_the_page_has_the_section_only_with_a_study(exported, tmp_path):
    a_study(conclusions=("mine is <near>",)).save(tmp_path / "study.json")
    page = render(exported.folder, study=tmp_path / "study.json").read_text()
    for words in ('id="sampling"', "some-model and 2 exports", "mine is &lt;near&gt;", 'id="chart-sampling_distance"'):
        assert words in page, words
    assert "/home/somebody" not in page and not (exported.folder / "study.json").exists()
    assert "Under sampling" not in render(exported.folder).read_text()


def test_hostile_names_stay_text(exported):
    study = a_study(("mine", HOSTILE), reference=HOSTILE, conclusions=(HOSTILE, "mine"))
    page = render_html(exported, sampled(study, exported.folder))
    assert "<img" not in page and page.count("</script>") == 1


@pytest.mark.slow
def test_plots_have_the_curves(exported, tmp_path):
    pytest.importorskip("matplotlib")
    a_study(("mine", "$x_{")).save(tmp_path / "study.json")
    render(exported.folder, tmp_path / "plots", tmp_path / "study.json")
    found = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert found >= {"depth", "sampling_distance", "sampling_perplexity", "sampling_repetition"}


def test_bad_files_give_one_clear_error(exported, tmp_path):
    good, path = a_study().as_dict(), tmp_path / "study.json"
    row = good["rows"][0]
    for text, words in (
        (None, "no such file.*qexport study -o"),
        ("{", "no JSON|unreadable"),
        ("[]", "not a JSON object"),
        (json.dumps({"validation": {}}), r"not a study, damaged, or of another version of qexport \(reference"),
        (json.dumps(good | {"format": 2}), r"another version of qexport \(format"),
        (json.dumps(good | {"rows": []}), "without rows"),
        (json.dumps(good | {"rows": [row | {"temperature": float("nan")}]}), "temperature that is not a number"),
        (json.dumps(good | {"rows": [row | {"distance": "far"}]}), r"rows\.0\.distance"),
    ):  # fmt: skip
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=words) as error:
            render(exported.folder, tmp_path / "plots", path)
        assert str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_study(path)
    assert not (tmp_path / "plots").exists() and not (exported.folder / "report.html").exists()
