"""What a recipe-less export makes of a table of embeddings: 4 or 8 bits, by what 4 cost the float model."""

import pytest
import torch

import qexport
from helpers import exports
from helpers.random_decoders import save_model
from qexport.api.stages import settling
from qexport.api.stages.preparing import default_recipe
from qexport.plan.model_plan import UNDECIDED, plan_for, with_table
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.validation.reference import decoder_feeds
from qexport.validation.table_cost import table_cost

RANDOM = CalibrationSpec(source="random", samples=2, sequence_length=16)
NEAREST = {"scheme": "w4a16_g32", "lm_head": "w4a16_g32", "embedding": "auto", "calibration": RANDOM}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return exports.capture(save_model("llama", tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))


@pytest.mark.parametrize("most, scheme", [(float("inf"), "w4a16_g32"), (0.0, "w8a16_g32")])
def test_the_cost_of_four_bits_decides(tied, tmp_path, monkeypatch, most, scheme):
    monkeypatch.setattr(settling, "MOST", most)
    recipe = Recipe(**NEAREST, weights={"method": "gptq"})
    made = qexport.export(tied.copy(), recipe, out_dir=tmp_path / "out")
    (table,) = made.embeddings
    assert (table.scheme.name, table.linear) == (scheme, "lm_head") and "4 bits cost KL 0." in table.reason
    written = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert (written.lm_head, written.embedding) == (scheme, "tied")
    assert made.manifest.linears[-1].scheme == scheme, "one table for both"


def test_without_text_to_measure_by_it_gets_8_bits(captured, tmp_path):
    made = qexport.export(captured("llama"), Recipe(**NEAREST), out_dir=tmp_path / "out")
    (table,) = made.embeddings
    assert table.scheme.name == "w8a16_g32" and "only measured for calibrated decoders" in table.reason
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").embedding == "w8a16_g32"


def test_8_bits_are_not_measured(tied, tmp_path, monkeypatch):
    monkeypatch.delattr(settling, "table_cost")
    made = qexport.export(tied.copy(), "closest", out_dir=tmp_path / "out")
    assert [(e.scheme.name, e.linear, e.reason) for e in made.embeddings] == [("w8a16_g32", "lm_head", "")]


def test_auto_in_place(tied, captured):
    recipe = Recipe(**NEAREST)
    assert with_table(tied, recipe).embedding == "tied"
    assert with_table(tied, recipe.model_copy(update={"lm_head": "float"})).embedding == "float"
    assert with_table(captured("llama"), recipe).embedding == "w4a16_g32"
    assert with_table(tied, Recipe(scheme="w4a16_g32")) == Recipe(scheme="w4a16_g32")
    _, (table,) = plan_for(tied, recipe)
    assert table.reason == UNDECIDED


def test_the_default_is_balanced_of_a_folder_and_plain_of_a_module(tied):
    assert default_recipe(tied).name == "balanced" and default_recipe(torch.nn.Linear(2, 2)).name == "w4a16_g32"


def test_the_cost_of_a_table_is_that_of_the_model_with_it(tied):
    feeds = decoder_feeds(tied, torch.randint(0, 90, (1, 8)))
    name = "model.embed_tokens.weight"
    table = tied.load(name)
    assert table_cost(tied.copy(), name, table, feeds, [None]) == pytest.approx(0.0, abs=1e-9)
    some = table_cost(tied.copy(), name, table * 1.1, feeds, [None])
    more = table_cost(tied.copy(), name, table * 1.5, feeds, [None])
    assert 0 < some < more
