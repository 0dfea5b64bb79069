"""Core ATen: each operator is translated, decomposed or refused with a reason, and files compute what it does."""

import pytest
import torch

import qexport
from helpers import exports, operators
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError, LoweringError
from qexport.lower.registry import reason_of
from qexport.recipe.recipe import Recipe

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])


@pytest.mark.parametrize("family", operators.FAMILIES)
def test_files_compute_what_operators_do(tmp_path, family):
    model = operators.Calls(operators.FAMILIES[family]).eval()
    axes = {name: {0: "batch"} for name in ("x", "n", "t")}
    made = exports.export(capture_model(model, operators.inputs(3), axes), FLOAT, "cpu", tmp_path / "out")
    run, wrong = made.in_onnxruntime(), []
    for batch in (3, 5):
        fed = operators.inputs(batch)
        with torch.no_grad():
            want = model(**fed)
        got = run(fed)
        wrong += [(name, batch) for name, value in want.items() if not operators.same(got[name], value)]
    assert not wrong


def test_every_operator_is_translated_decomposed_or_refused_with_a_reason():
    called = {name.split(" ")[0] for family in operators.FAMILIES.values() for name in family}
    reasons = {str(operator).removeprefix("aten."): reason_of(operator) for operator in operators.core_operators()}
    assert all(reasons[name] == "" for name in called if name in reasons)
    assert sorted(name for name, reason in reasons.items() if not reason and name not in called) == []


class Hopeless(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        z = torch.lgamma(y)
        return torch.histc(y, 4) + torch.lgamma(z).sum() + torch.digamma(y).sum()


def test_all_that_cannot_be_translated_is_named_at_once_with_its_lines():
    with pytest.raises(LoweringError) as raised:
        qexport.inspect(Hopeless().eval(), "w8a16_g32", example_inputs=(torch.randn(2, 8),))
    parts = raised.value.message.split("; ")
    assert [part.split(" ")[0].split(".")[1] for part in parts] == ["lgamma", "histc", "digamma"]
    assert all("because" in part and f" at {__file__}:" in part for part in parts)
    assert parts[0].endswith("z = torch.lgamma(y) and 1 more")


class Branches(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_branches_are_explained():
    with pytest.raises(CaptureError, match=r"torch\.cond holds graphs .* at .*test_core_aten\.py"):
        capture_model(Branches().eval(), (torch.randn(2, 8),))


class Chooses(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.second(self.first(x).relu()).argmax(-1)


def test_a_module_that_returns_an_index_is_validated(tmp_path):
    torch.manual_seed(0)
    model, x = Chooses().eval(), torch.randn(64, 32)
    qexport.export(model, "w8a16_g32", out_dir=tmp_path / "out", example_inputs=(x,), calibration=[(x,)])
    report = qexport.validate(tmp_path / "out", model, inputs=[(x,)])
    (output,) = report.outputs
    assert 0.9 < output.equal_share <= 1 and output.sqnr_db is None
    assert f"output output has {output.equal_share:.1%} of its elements equal" in report.verdict
    assert report.reader.difference == 0
