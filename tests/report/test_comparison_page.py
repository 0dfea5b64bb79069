"""The page of two exports, the test window by window, and what else a folder may hold: scores on tasks, speed."""

import json

import pytest

import qexport
from helpers.report_folders import full_report, logits, plain_report, write_validated
from qexport.report import read_validated
from qexport.report.speed import keep_speed
from qexport.runtime.benchmark import BenchResult, Measurement
from qexport.validation.report import WindowScores
from qexport.validation.verdict import with_verdict

WINDOWS = 8


def windowed(kl: float, *, float_nll=2.0, **more):
    """A report whose windows have KL `kl` and a bit more each."""
    each = tuple(kl + 0.001 * i for i in range(WINDOWS))
    by_window = WindowScores(
        kl=each, nll=tuple(float_nll + value for value in each), float_nll=(float_nll,) * WINDOWS,
        top1=tuple(0.9 - value for value in each),
    )  # fmt: skip
    scores = logits(
        kl_mean=sum(each) / WINDOWS, top1_agreement=0.85, by_window=by_window, kl_by_position=(kl, 2 * kl), **more
    )
    return with_verdict(full_report().model_copy(update=dict(logits=scores)))


def measured(folder, rate):
    return Measurement(str(folder), 0.5, {128: rate}, {16: rate / 10}, 10**8, 10**7, {}, {})


@pytest.fixture
def pair(tmp_path):
    first = write_validated(tmp_path / "a", windowed(0.3), recipe="name: coarse\nscheme: w4a16_g32\n")
    second = write_validated(
        tmp_path / "b", windowed(0.1), bytes={"model": 4_000_000}, recipe="name: fine\nscheme: w4a16_g32\n"
    )
    return first.folder, second.folder


def test_windows_are_compared_one_by_one(pair):
    found = qexport.compare(*pair)
    kl, perplexity, same = found.paired
    assert (kl.name, kl.windows, kl.p, kl.shown) == ("mean KL", 8, 2 / 256, True)
    assert kl.difference == pytest.approx(-0.2) and kl.error == pytest.approx(0.0, abs=1e-9)
    assert perplexity.difference == pytest.approx(-0.2) and same.difference == pytest.approx(0.2)
    assert found.verdict[0].startswith("The second is closer to the float model: its mean KL is lower by 0.2")
    assert found.verdict[1] == "The first is smaller: 75% of the bytes of the other"
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["paired"][0]["p"] == 2 / 256


def test_other_text_has_no_paired_test(tmp_path, pair):
    other = write_validated(tmp_path / "c", windowed(0.1, float_nll=2.1)).folder
    old = write_validated(tmp_path / "d", plain_report()).folder
    for folder in (other, old):
        found = qexport.compare(pair[0], folder)
        assert found.paired == () and any("No test window by window" in note for note in found.notes)


def test_the_page_says_what_a_team_decides_by(pair, tmp_path):
    qexport.compare(*pair, page := tmp_path / "page.html")
    text = page.read_text()
    for words in (
        "coarse or fine", "coarse: fair", "fine: good", "Side by side", "Window by window", "Error along the model",
        "KL along the text", "Every linear of both", "bytes, model", "problems",
    ):  # fmt: skip
        assert words in text, words
    assert '<td class="n better">4.0 MB</td>' not in text and '<td class="n better">3.0 MB</td>' in text
    assert "<script>alert" not in text and "http" not in text.replace("http-equiv", "")


def test_speed_is_kept_and_compared_where_conditions_are_alike(pair):
    keep_speed(BenchResult(measured(pair[0], 100.0), measured(pair[1], 200.0), {}, 2))
    found = qexport.compare(*pair)
    (decode,) = [m for m in found.measures if m.name == "decoding after 16 tokens, tokens/s"]
    assert (decode.first, decode.second, decode.better) == (10.0, 20.0, 2)
    assert "The second is 2.00 times as fast: prompt of 128 tokens" in found.verdict
    keep_speed(BenchResult(measured(pair[1], 200.0), None, {}, 4))
    found = qexport.compare(*pair)
    assert {m.better for m in found.measures if "tokens/s" in m.name} == {0}
    assert any("different conditions" in note for note in found.notes)
    assert read_validated(pair[1]).speed.threads == 4 and read_validated(pair[1]).report is not None
    assert "20 tokens/s" in qexport.render(pair[1]).read_text()


def test_scores_of_lm_eval_are_shown_where_they_lie(pair):
    for folder, score in zip(pair, (0.5, 0.625), strict=True):
        place = folder / "eval" / "model"
        place.mkdir(parents=True)
        (place / "results_2026-01-01.json").write_text(json.dumps({
            "results": {"arc_easy": {"alias": "arc_easy", "acc,none": score, "acc_stderr,none": 0.01}},
            "higher_is_better": {"arc_easy": {"acc": True}}, "n-shot": {"arc_easy": 0},
        }))  # fmt: skip
        (place / "results_broken.json").write_text("{")
    (task,) = read_validated(pair[0]).tasks
    assert (task.task, task.metric, task.value, task.error, task.shots) == ("arc_easy", "acc", 0.5, 0.01, 0)
    (row,) = [m for m in qexport.compare(*pair).measures if m.name == "arc_easy, acc"]
    assert row.text == ("0.500 ± 0.010", "0.625 ± 0.010") and row.better == 2
    assert 'id="tasks"' in qexport.render(pair[0]).read_text()


def test_notebooks_show_tables_and_shells_a_line(pair):
    found, report = qexport.compare(*pair), read_validated(pair[0]).report
    assert repr(report) == "<Report beside some/model: quality fair, mean KL 0.3035, 0 problems; see .verdict>"
    assert repr(found).startswith("<Comparison of ") and len(repr(found)) < 600
    hostile = report.model_copy(update=dict(text="<script>"))
    for shown in (hostile._repr_html_(), found._repr_html_()):
        assert shown.count("<table>") == 1 and "<script>" not in shown and "KL" in shown
