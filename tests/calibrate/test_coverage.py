"""Input features that calibration never makes active: weights, the report, and the warning, from export to the page."""

import json
from dataclasses import replace

import pytest
import torch

from qexport.api.exporting import export
from qexport.api.validating import validate
from qexport.artifact import manifest as manifests
from qexport.calibrate.coverage import unseen_shares, warning
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import open_session
from qexport.validation.running import run_session


class Gate(torch.nn.Module):
    """Half of the features between the two linears stay at zero for positive inputs; others wake them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 256), torch.nn.Linear(256, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def gate():
    torch.manual_seed(0)
    net = Gate()
    net.up.bias.data -= 0.5
    return net


HALF = torch.rand(64, 32, generator=torch.Generator().manual_seed(1))


def error(net, folder, inputs) -> float:
    """The largest, of what a folder makes of inputs, over the largest that the float module makes."""
    with torch.no_grad():
        want = net(inputs)
    session = open_session(folder, manifests.load(folder), threads=1)
    got = run_session(session, {"x": inputs}, ["output"])["output"]
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_g32"])
def test_gptq_is_right_on_inputs_that_wake_other_features(gate, tmp_path, scheme):
    made = {}
    for method in ("gptq", "rtn"):
        given = Recipe(scheme=scheme, weights={"method": method})
        data = [(HALF,)] if method == "gptq" else None
        made[method] = export(gate, given, out_dir=tmp_path / method, example_inputs=(HALF,), calibration=data)
    with torch.no_grad():
        dead = int((gate.up(HALF).relu() == 0).all(0).sum())
    assert made["gptq"].unseen == {"down": dead / 256} and 0.2 < dead / 256 < 0.8
    assert not made["rtn"].unseen and not made["rtn"].warnings
    blocks = json.loads((tmp_path / "gptq" / "report.json").read_text())["export"]["blocks"]
    assert {name: n for block in blocks for name, n in block["unseen"].items()} == {"down": dead}
    woken = error(gate, tmp_path / "gptq", -HALF)
    assert woken < 1.5 * error(gate, tmp_path / "rtn", -HALF) + 1e-3


METHODS = ["w8a8_static", "w8a8_dyn", "w4a16_g64_awq", "w8a8_static_lae", "w4a16_g64_zq_local"]


@pytest.mark.parametrize("recipe", METHODS)
def test_no_method_gives_up_features_that_were_never_active(gate, tmp_path, recipe):
    made = export(gate, recipe, out_dir=tmp_path / "out", example_inputs=(HALF,), calibration=[(HALF,)])
    limit = 0.04 if "w8" in recipe else 0.25
    assert error(gate, tmp_path / "out", HALF) < limit
    # A static range ends where calibration ended; weights are as good there as anywhere.
    assert error(gate, tmp_path / "out", -HALF) < (0.7 if "static" in recipe else limit)
    assert made.unseen.keys() <= {"down"}


def test_the_warning_stands_in_the_summary_and_in_the_verdict(gate, tmp_path):
    made = export(gate, "w8a8_static", out_dir=tmp_path / "out", example_inputs=(HALF,), calibration=[(HALF,)])
    (sentence,) = made.warnings
    assert sentence.startswith(f"calibration never made {made.unseen['down']:.1%} of the input features of down active")
    report = validate(tmp_path / "out", gate, inputs=[(HALF,)])
    assert sentence in report.verdict and sentence not in report.problems
    assert sentence.split(";")[0] in (tmp_path / "out" / "report.html").read_text()


def test_shares_and_sentences():
    plan = LinearPlan("a", "block", (8, 10), Scheme.parse("w4a16_g32"))
    plans = [plan, replace(plan, name="b"), replace(plan, name="c", scheme=None)]
    shares = unseen_shares({"a": 1, "b": 4, "c": 9}, plans)
    assert shares == {"a": 0.1, "b": 0.4}
    assert "40.0% of the input features of b active (of 2 linears it left 10% or more so)" in warning(shares)
    assert not warning({"a": 0.04}) and not warning({})
