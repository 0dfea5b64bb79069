"""What validation finds of an encoder-decoder as a whole: the costs of linears of both parts, other float forms."""


import pytest
import torch

import qexport
from helpers.random_modules import save_seq2seq
from helpers.runners import tokens
from qexport.recipe.recipe import Override, Recipe
from qexport.validation.verdict import reference_problems

HEARING, WRITING = "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"
TEXTS = {"windows": 3, "window": 12, "greedy": 8}


def quantized(*names):
    """A recipe under which linears of these names alone are quantized."""
    overrides = [Override(match=name, scheme="w4a16_g16") for name in names]
    overrides.append(Override(match="*", scheme="float"))
    return Recipe(scheme="w4a16_g16", overrides=tuple(overrides), accuracy_level=1, weights={"method": "rtn"})


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_seq2seq("t5", tmp_path_factory.mktemp("model") / "t5", gain=2.0)


def test_costs_are_told_by_the_logits_of_the_whole_beside_other_float_forms(t5, tmp_path):
    found = {}
    for out, names in (("one", [WRITING]), ("two", [WRITING, HEARING])):
        qexport.export(t5, quantized(*names), out_dir=tmp_path / out)
        found[out] = qexport.validate(tmp_path / out, t5, sensitivity=True, references=out == "one", **TEXTS)
    one, two = (found[out].sensitivity for out in ("one", "two"))
    # Of the only one all is gone when its value is the float one, and of two what the other one leaves.
    assert one.measured == {WRITING: pytest.approx(one.kl_mean, rel=1e-3)} and one.kl_mean > 1e-4
    assert two.measured[HEARING] == pytest.approx(two.kl_mean - one.kl_mean, rel=1e-2)
    assert two.kl_mean > 1.05 * one.kl_mean and two.tokens == 3 * 9
    costs = {row.name: row.kl_cost for row in found["two"].layers.linears}
    assert set(costs) == {HEARING, WRITING} and 0.3 < sum(costs.values()) / two.kl_mean < 3
    assert two.kl_foretold == pytest.approx(sum(costs.values()))
    assert {override.match for override in two.overrides} == {HEARING, WRITING}
    assert any("costs the most KL" in sentence for sentence in found["two"].verdict)
    check_forms(found["one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "the float files are removed"
    assert found["two"].parts["encoder"].sensitivity.kl_mean == pytest.approx(two.kl_mean)


def check_forms(report):
    assert [form.name for form in report.references] == ["float16 in PyTorch", "float32 in ONNX Runtime"]
    half, single = (form.logits.kl_mean for form in report.references)
    # KL goes with the square of the unit of the dtype, 2^-26 from float16 to float32, and kernels differ.
    assert 0 < single < 2**-13 * half and half < report.logits.kl_mean / 4
    assert not reference_problems(report.references) and not report.problems
    assert any("times that of float16 in PyTorch" in sentence for sentence in report.verdict)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_costs_of_other_kinds_add_up_to_what_is_measured(family, tmp_path):
    model = save_seq2seq(family, tmp_path / family, gain=2.0)
    given, calibration = {}, tokens(2, 12)
    if family == "whisper":
        given = {"inputs": torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))}
        calibration = given["inputs"]
    recipe = Recipe(scheme="w8a16_g32", accuracy_level=1, weights={"method": "rtn"})
    qexport.export(model, recipe, out_dir=tmp_path / "out", calibration=calibration)
    report = qexport.validate(tmp_path / "out", model, sensitivity=True, references=True, **TEXTS, **given)
    check_forms(report)
    whole = report.sensitivity
    assert 0.3 < whole.kl_foretold / whole.kl_mean < 3
    assert {name for name in whole.measured if "/" not in name} <= {row.name for row in report.layers.linears}
    halves = [part.sensitivity.measured for part in report.parts.values()]
    assert all(halves) and len(whole.measured) == sum(map(len, halves))
    worst = max(report.layers.linears, key=lambda row: row.kl_cost or 0.0)
    assert whole.measured[worst.name] > 0
