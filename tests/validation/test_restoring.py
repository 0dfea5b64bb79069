import pytest
import torch

from qexport.api.exporting import export
from qexport.artifact import manifest as manifests
from qexport.recipe.recipe import Override, Recipe
from qexport.validation.reference import decoder_feeds
from qexport.validation.restoring import kl_costs


def windows(count, length):
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))


def only(match, **more):
    """A recipe under which the linears of one name alone are quantized."""
    overrides = (Override(match=match, scheme="w4a16_g32"), Override(match="*", scheme="float"))
    return Recipe(scheme="w4a16_g32", overrides=overrides, accuracy_level=1, **more)


@pytest.fixture
def costs(captured, model_folder, tmp_path):
    def measured(recipe, *, transformed=False, family="llama", target="cpu", **more):
        out = tmp_path / "out"
        export(model_folder(family), recipe, out_dir=out, target=target, **more)
        model = captured(family)
        feeds = decoder_feeds(model, windows(2, 20))
        manifest = manifests.load(out)
        found = kl_costs(out, manifest, model, feeds, transformed=transformed, provider=manifests.CPU)
        assert not list(out.glob(".*"))  # the model with corrections is gone
        return found

    return measured


@pytest.mark.by_default("*o_proj", "*down_proj")
@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "down_proj"])
def test_the_only_quantized_linear_costs_everything(costs, name):
    whole, falls = costs(only(f"model.layers.1.*.{name}"))
    (fall,) = falls.values()
    assert fall == pytest.approx(whole, rel=1e-3)
    assert whole > 1e-4


def test_of_two_linears_in_one_product_each_is_restored_alone(costs):
    overrides = (
        Override(match="model.layers.0.self_attn.q_proj", scheme="w4a16_g32"),
        Override(match="model.layers.0.self_attn.k_proj", scheme="w4a16_g32"),
        Override(match="*", scheme="float"),
    )  # fmt: skip
    whole, falls = costs(Recipe(scheme="w4a16_g32", overrides=overrides, accuracy_level=1))
    assert set(falls) == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert all(0 < abs(fall) < whole for fall in falls.values())


def test_an_output_projection_and_an_embedding_count_too(costs):
    whole, falls = costs(only("lm_head", embedding="w4a16_g32"))
    assert set(falls) == {"lm_head", "prologue"}
    assert 0 < falls["prologue"] < whole and 0 < falls["lm_head"] < whole


def test_smoothed_linears_are_restored_in_the_scale_of_the_file(costs):
    smooth = {"method": "smoothquant", "alpha": 0.5}
    recipe = Recipe(scheme="w8a8_dyn", smooth=smooth, overrides=(Override(match="*v_proj", scheme="float"),))
    whole, falls = costs(recipe, transformed=True, calibration=windows(4, 20))
    assert all(abs(fall) < whole for fall in falls.values())
    assert sum(falls.values()) == pytest.approx(whole, rel=1.0)
