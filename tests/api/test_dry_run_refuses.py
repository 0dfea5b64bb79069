"""What an export refuses at its start, the dry run refuses in the same words."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qexport
from qexport.errors import InputError, LoweringError, NumericsError, RecipeError
from qexport.recipe.recipe import CalibrationSpec, Recipe

RANDOM = CalibrationSpec(source="random", samples=2, sequence_length=8)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x):
        return torch.cummax(torch.lgamma(self.a(x)), 1).values * torch.digamma(x)


def both(model, recipe, out, **options):
    """What the export says, and what the dry run does."""
    said = []
    for verb in (qexport.export, qexport.inspect):
        place = {"out_dir": out} if verb is qexport.export else {}
        with pytest.raises(qexport.QExportError) as found:
            verb(model, recipe, **place, **options)
        said.append(found.value)
    assert not out.exists() and type(said[0]) is type(said[1])
    return said


def test_every_operator_without_a_translation_is_named_at_once(tmp_path):
    made, dry = both(Odd(), "w8a8_dyn", tmp_path / "out", example_inputs=(torch.randn(2, 16),))
    assert str(made) == str(dry) and isinstance(made, LoweringError)
    assert all(f"{name}.default has no ONNX translation" in str(made) for name in ("cummax", "lgamma", "digamma"))


@pytest.mark.parametrize(
    ("recipe", "options", "kind"),
    [
        (Recipe(scheme="w8a8_dyn"), {"target": "cuda", "dtype": "bfloat16"}, InputError),
        (Recipe(scheme="w4a16_g32", kv_cache={"bits": 8}), {"attention": "standard"}, LoweringError),
        (Recipe(scheme="w4a16_g32", embedding="w4a16_g32", overrides=[{"match": "nowhere", "scheme": "float"}]), {},
         RecipeError),
        (Recipe(scheme="w4a16_g32", weights={"method": "gptq"}), {"calibration": "nowhere.txt"}, InputError),
    ],
    ids=["kernels", "cache", "overrides", "text"],
)  # fmt: skip
def test_kernels_caches_overrides_and_texts(recipe, options, kind, model_folder, tmp_path):
    made, dry = both(model_folder("llama"), recipe, tmp_path / "out", **options)
    assert str(made) == str(dry) and isinstance(made, kind)


@pytest.fixture
def beyond(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.model.norm.weight.data[3] = 1e5
    model.save_pretrained(tmp_path / "beyond")
    return tmp_path / "beyond"


def test_weights_beyond_float16_are_refused_and_bfloat16_takes_them(beyond, tmp_path):
    recipe = Recipe(scheme="w4a16_g32", weights={"method": "rtn"}, calibration=RANDOM)
    with pytest.raises(NumericsError, match=r"model.norm.weight: does not fit float16: it holds 1e\+05.*bfloat16"):
        qexport.export(beyond, recipe, out_dir=tmp_path / "half", target="cuda")
    with pytest.raises(NumericsError, match="does not fit float16"):
        qexport.inspect(beyond, recipe, target="cuda", calibrate=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beyond"]
    qexport.export(beyond, recipe, out_dir=tmp_path / "brain", target="cuda", dtype="bfloat16")


def test_scales_below_float16_are_refused(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e-7)
    model.save_pretrained(tmp_path / "tiny")
    recipe = Recipe(scheme="w4a16_g32", weights={"method": "rtn"}, calibration=RANDOM)
    with pytest.raises(NumericsError, match=r"layers.0.mlp.down_proj.weight_scale: does not fit float16: it holds sc"):
        qexport.export(tmp_path / "tiny", recipe, out_dir=tmp_path / "out", target="cuda")
    assert not (tmp_path / "out").exists()
