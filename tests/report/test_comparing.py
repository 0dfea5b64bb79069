import json
import math

from helpers.report_folders import logits, plain_report, write_validated
from qexport.report import compare
from qexport.report.comparing import compare_exports
from qexport.validation.report import ValueComparison


def with_rows(*rows):
    report = plain_report()
    found = tuple(
        ValueComparison(name=name, scheme="w4a16_g32", own_sqnr_db=sqnr, sqnr_db=sqnr, max_abs_error=error)
        for name, sqnr, error in rows
    )
    return report.model_copy(update=dict(layers=report.layers.model_copy(update=dict(linears=found))))


def test_linears_that_got_worse_come_first(tmp_path):
    nan = math.nan
    first = with_rows(("better", 10.0, 1), ("worse", 30.0, 1), ("broke", 20.0, 1), ("same", 9.0, 1), ("both", nan, nan),
                      ("exact", math.inf, 0), ("gone", 1.0, 1))  # fmt: skip
    second = with_rows(("better", 15.0, 1), ("worse", 20.0, 1), ("broke", nan, nan), ("same", 9.0, 1),
                       ("both", nan, nan), ("exact", 30.0, 1), ("new", 2.0, 1))  # fmt: skip
    found = compare_exports(write_validated(tmp_path / "a", first), write_validated(tmp_path / "b", second))
    assert [p.name for p in found.linears] == ["broke", "exact", "worse", "same", "both", "better"]
    assert [p.difference for p in found.linears] == [None, None, -10.0, 0.0, None, 5.0]
    assert [p.worse for p in found.linears] == [True, True, True, False, False, False]
    assert found.only == (("gone",), ("new",)) and found.linears[0].bytes == (100, 100)


def test_measures_stand_side_by_side(tmp_path):
    a, b = plain_report(), plain_report().model_copy(update=dict(logits=logits(kl_mean=0.2, perplexity=None)))
    write_validated(tmp_path / "a", a)
    write_validated(tmp_path / "b", b, bytes={"model": 1_500_000})
    found = compare(tmp_path / "a", tmp_path / "b")
    by_name = {m.name: (m.first, m.second) for m in found.measures}
    assert by_name["KL, mean"] == (0.1, 0.2) and by_name["perplexity"] == (11.0, None)
    assert by_name["bytes, model"] == (3_000_000, 1_500_000) and by_name["problems"] == (0, 0)
    assert by_name["lowest own SQNR of a linear"] == (29.0, 29.0)
    assert len(found.notes) == 1 and "No test window by window" in found.notes[0]
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["linears"][0]["difference"] == 0


def test_what_does_not_compare_is_said(tmp_path):
    other = plain_report(text="other", reference="other/model")
    found = compare_exports(write_validated(tmp_path / "a", plain_report()), write_validated(tmp_path / "b", other))
    assert len(found.notes) == 2 and "do not compare" in found.notes[0] and "other/model" in found.notes[1]


def test_models_without_text_compare_by_outputs(tmp_path):
    def module(sqnr):
        row = ValueComparison(name="y", sqnr_db=sqnr, max_abs_error=1.0)
        return plain_report().model_copy(update=dict(logits=None, outputs=(row,)))

    found = compare_exports(
        write_validated(tmp_path / "a", module(20.0), kind="module"),
        write_validated(tmp_path / "b", module(None), kind="module"),
    )
    assert [(m.first, m.second) for m in found.measures if m.name == "output y, SQNR"] == [(20.0, None)]
