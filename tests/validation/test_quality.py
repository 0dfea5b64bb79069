"""Grades, limits, standard errors and the paired test, on numbers whose answers are known."""

import math

import pytest
import torch

from helpers.report_folders import logits, plain_report
from qexport.errors import InputError
from qexport.formatting import parsed_share
from qexport.validation.bootstrap import sign_flip_p, standard_error
from qexport.validation.formatting import share, with_error
from qexport.validation.gates import Gates
from qexport.validation.quality import GRADES, graded


def mean(means):
    return means[:, 0]


def test_the_bootstrap_finds_the_standard_error_of_a_mean():
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = float(values.std()) / math.sqrt(40)
    assert standard_error(values, mean) == pytest.approx(expected, rel=0.05)
    assert standard_error(values, mean) == standard_error(values, mean), "seeded"
    # Two windows: resampling alone would find 0.71 of it.
    assert standard_error(torch.tensor([[0.0], [2.0]]).double(), mean) == pytest.approx(1.0, rel=0.05)


def test_what_has_no_standard_error():
    assert standard_error(torch.ones(1, 1).double(), mean) is None
    assert standard_error(torch.tensor([[1.0], [math.inf]]).double(), mean) is None


def test_the_paired_test_counts_signs():
    assert sign_flip_p(torch.ones(3).double()) == 2 / 8
    assert sign_flip_p(torch.tensor([3.0, -1.0]).double()) == 1.0  # 2 of 2, and so are all but +-4
    assert sign_flip_p(torch.zeros(5).double()) == 1.0
    many = torch.full((30,), 0.1).double()
    assert 0 < sign_flip_p(many) < 1e-3


def test_limits_of_grades_only_get_looser():
    for better, worse in zip(GRADES, GRADES[1:], strict=False):
        assert better.kl < worse.kl and better.perplexity < worse.perplexity
        assert better.top1 > worse.top1 and better.sqnr_db > worse.sqnr_db


def of(**changes):
    given = dict(kl_mean=0.0, perplexity=10.0, float_perplexity=10.0, top1_agreement=1.0)
    return graded(plain_report().model_copy(update=dict(logits=logits(**given | changes))))


@pytest.mark.parametrize("field, value", [("kl_mean", "kl"), ("perplexity", "perplexity"), ("top1_agreement", "top1")])
def test_the_worst_measure_decides(field, value):
    assert (of().grade, of().tone) == ("lossless", "good")
    for grade in GRADES[:-1]:
        limit = getattr(grade, value) * (10.0 if field == "perplexity" else 1.0)
        assert of(**{field: limit}).grade == grade.name
    assert (of(kl_mean=2.0).grade, of(kl_mean=2.0).tone) == ("poor", "bad")


def test_a_lower_perplexity_is_no_gain():
    found = of(perplexity=9.0, kl_mean=0.3)
    assert found.grade == "fair" and "rise" not in found.sentence and "-" not in found.sentence.replace("4-bit", "")


def test_what_is_not_finite_is_broken():
    found = of(kl_mean=None, perplexity=None, nonfinite_tokens=3)
    assert (found.grade, found.tone) == ("broken", "bad") and "mean KL is not finite" in found.sentence


def test_a_grade_says_when_it_may_as_well_be_another():
    limit = GRADES[2].kl
    assert of(kl_mean=limit - 0.001, kl_error=0.0005).sentence.endswith(f"(good goes to {limit})")
    assert of(kl_mean=limit - 0.001, kl_error=0.002).sentence.endswith("; within one standard error it is fair")


def test_gates():
    scores = logits(kl_mean=0.1, kl_error=0.004, perplexity=11.0, top1_agreement=0.75)
    kl, rise, same = Gates(max_kl=0.1, max_ppl_rise=0.05, min_top1=0.8).of(scores)
    assert (kl.passed, rise.passed, same.passed) == (True, False, False)
    assert rise.value == pytest.approx(0.1) and rise.limit == 0.05
    assert rise.sentence == (
        "--max-ppl-rise missed: perplexity is 1.1 times the float model's, and at most 1.05 times is allowed"
    )
    assert kl.sentence == "--max-kl kept: mean KL is 0.1000 ± 0.0040, and at most 0.1 is allowed"
    assert not any(gate.passed for gate in Gates(1.0, 1.0, 0.0).of(logits(
        kl_mean=None, perplexity=None, nonfinite_tokens=1)))  # fmt: skip
    for wrong in ({"max_kl": -1}, {"max_kl": math.nan}, {"max_ppl_rise": math.inf}, {"min_top1": 1.5}):
        with pytest.raises(InputError):
            Gates(**wrong)


def test_shares_are_read_and_written():
    assert [parsed_share(text, "x") for text in ("5%", "0.05", "150 %", "1")] == [0.05, 0.05, 1.5, 1.0]
    for wrong in ("5", "-1%", "many", ""):
        with pytest.raises(InputError, match="not a share"):
            parsed_share(wrong, "x")
    assert (with_error(0.08123, 0.0031), with_error(1.5, None), with_error(None, 1.0)) == (
        "0.0812 ± 0.0031", "1.5", "not finite")  # fmt: skip
    assert with_error(1.6e-5, 6e-7) == "1.6e-05 ± 6e-07" and share(0.75, 0.01) == "75.0 ± 1.0 %"
