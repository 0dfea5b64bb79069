"""What passes promise of values is written at export, and decides how a validation compares layers."""

import json
from dataclasses import dataclass

import pytest

import qexport
from qexport.passes.base import GraphPass, PassResult, SiteRecord
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.validation.account import transforms

RANDOM = CalibrationSpec(source="random", samples=2, sequence_length=8)


@dataclass(frozen=True)
class Claims(GraphPass):
    """Says that it changed every block, and changes nothing."""

    def call(self, module, context):
        return PassResult([SiteRecord("site", "claimed")])


@pytest.mark.by_default("cache", "own")
@pytest.mark.parametrize(
    ("recipe", "extra", "moves"),
    [
        ({"scheme": "w4a16_g32", "kv_cache": {"bits": 8}}, (), False),
        ({"scheme": "w8a8_dyn", "smooth": {"method": "smoothquant"}}, (), True),
        ({"scheme": "w8a8_dyn"}, (Claims(),), True),
    ],
    ids=["cache", "smooth", "own"],
)
def test_only_passes_that_do_not_keep_values_make_a_comparison_lenient(recipe, extra, moves, model_folder, tmp_path):
    recipe = Recipe(weights={"method": "rtn"}, calibration=RANDOM, **recipe)
    out = tmp_path / "out"
    qexport.export(model_folder("llama"), recipe, out_dir=out, extra_passes=extra)
    assert transforms(out) is moves
    if moves:
        return
    report = qexport.validate(out, model_folder("llama"), windows=1, window=16, greedy=0, threads=1)
    assert not any(row.rescaled for row in (*report.layers.linears, *report.layers.attentions)) and not report.problems
    kept = json.loads((out / "report.json").read_text())
    del kept["export"]["passes"]
    (out / "report.json").write_text(json.dumps(kept))
    assert transforms(out)  # nothing is known of promises


@pytest.mark.parametrize("export", ["a model", ["a", "list"], None, {"passes": "none", "blocks": []}, {"tuned": "yes"}])
def test_of_a_damaged_account_nothing_is_known(tmp_path, export):
    (tmp_path / "report.json").write_text(json.dumps({"export": export}))
    assert transforms(tmp_path)
