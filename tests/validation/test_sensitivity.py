"""What linears cost in KL in a report: foretold for all, measured for the costliest, and what would buy it back."""

import pytest

from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.api.validating import validate
from qexport.errors import InputError
from qexport.mixed_precision.allocate import SchemeChoice
from qexport.mixed_precision.costs import Costs, PricedItem
from qexport.mixed_precision.sensitivity import suggested
from qexport.recipe.recipe import Override, Recipe
from qexport.validation.report import ValueComparison

TEXT = " ".join(f"w{i * i % 97}" for i in range(600))
OPTIONS = dict(text=TEXT, windows=4, window=64, greedy=0)
WORST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model("llama_bias", tmp_path_factory.mktemp("tied"))
    write_word_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def validated(model, tmp_path_factory):
    """A report of an export in which one linear has half the bits of all others, and its folder."""
    recipe = Recipe(
        scheme="w8a16_g128", lm_head="w8a16_g128", embedding="tied",
        overrides=(Override(match=WORST, scheme="w2a16_g32"),), accuracy_level=1,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("exports") / "out"
    export(model, recipe, out_dir=out)
    return validate(out, model, sensitivity=True, **OPTIONS), out


def test_the_linear_with_the_fewest_bits_costs_the_most_foretold_and_measured(validated):
    report, _ = validated
    blocks = [row for row in report.layers.linears if row.name != "lm_head"]
    assert max(blocks, key=lambda row: row.kl_cost).name == WORST
    falls = {name: fall for name, fall in report.sensitivity.measured.items() if name.startswith("model.layers")}
    assert max(falls, key=falls.get) == WORST
    assert next(b.match for b in report.sensitivity.overrides if b.match != "lm_head") == WORST


def test_costs_add_up_to_about_the_kl(validated):
    found = validated[0].sensitivity
    assert found.kl_foretold == pytest.approx(found.kl_mean, rel=0.5)
    assert found.tokens == 4 * 64


def test_an_embedding_is_measured_too(validated):
    assert "prologue" in validated[0].sensitivity.measured


@pytest.mark.slow
def test_a_suggested_override_does_what_it_promises(model, validated, tmp_path):
    report, out = validated
    better = next(b for b in report.sensitivity.overrides if b.match == WORST)
    recipe = Recipe.load(out / "recipe.yaml")
    changed = (Override(match=better.match, scheme=better.scheme), *recipe.overrides[1:])
    made = export(model, recipe.model_copy(update={"overrides": changed}), out_dir=tmp_path / "better")
    again = validate(tmp_path / "better", model, sensitivity=True, **OPTIONS)
    entries = {entry.name: entry for entry in made.manifest.linears}
    before = next(row for row in report.layers.linears if row.name == WORST)
    assert entries[WORST].bytes - before.bytes == better.more_bytes
    gained = report.sensitivity.kl_mean - again.sensitivity.kl_mean
    assert gained == pytest.approx(better.kl_gain, rel=0.6)


def test_it_is_said_where_there_are_no_logits(tmp_path):
    import torch

    net, inputs = torch.nn.Sequential(torch.nn.Linear(64, 64)), (torch.randn(2, 64),)
    export(net, "w8a16", out_dir=tmp_path / "out", example_inputs=inputs)
    with pytest.raises(InputError, match="measured on logits"):
        validate(tmp_path / "out", net, inputs=[inputs], sensitivity=True)


def row(name, cost, size=100, scheme="w4a16_g64"):
    return ValueComparison(name=name, scheme=scheme, kl_cost=cost, bytes=size)


def test_what_is_suggested_is_the_best_for_a_byte_with_what_the_method_leaves():
    choices = (
        SchemeChoice("w4a16_g64", 100, 0.4),
        SchemeChoice("w4a16_g32", 110, 0.3),
        SchemeChoice("w8a16_g32", 200, 0.0),
    )
    kl = {"a": {"w4a16_g64": 0.4, "w4a16_g32": 0.3, "w8a16_g32": 0.0}}
    (best,) = suggested([row("a", 0.2)], Costs((PricedItem("a", choices, 100),), {}, kl))  # half of the cost is left
    assert (best.scheme, best.instead_of, best.more_bytes) == ("w4a16_g32", "w4a16_g64", 10)
    assert best.kl_gain == pytest.approx(0.05)


def test_the_best_come_first_and_what_cannot_be_better_is_left_out():
    choices = {
        n: (SchemeChoice("w4a16_g64", 100, cost), SchemeChoice("w8a16_g32", 200, 0.0))
        for n, cost in (("q", 0.1), ("k", 0.3))
    }
    kl = {name: {choice.scheme: choice.kl for choice in found} for name, found in choices.items()}
    costs = Costs(tuple(PricedItem(name, found, 100) for name, found in choices.items()), {}, kl)
    found = suggested([row("q", 0.1), row("k", 0.3)], costs)
    assert [better.match for better in found] == ["k", "q"]
    eight = Costs(tuple(PricedItem(name, found, 200) for name, found in choices.items()), {}, kl)
    assert suggested([row("q", 0.0, 200, "w8a16_g32"), row("other", 0.3)], eight) == ()
