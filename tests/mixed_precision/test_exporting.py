import json
from pathlib import Path

import pytest

import qexport
from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.api.stages import calibrating
from qexport.api.stages.capturing import capture_model
from qexport.api.validating import validate
from qexport.artifact.manifest import CPU
from qexport.errors import InputError, RecipeError
from qexport.recipe.recipe import Override, Recipe
from qexport.recipe.registry import section
from qexport.targets.cpu import CpuTarget

TEXT = " ".join(f"w{i * i % 97}" for i in range(600))
MEASURED = dict(text=TEXT, windows=4, window=64, calibration="random")
# With the most bytes of 4 bits, and wider than elsewhere: the graph of a small model is a large part of its file.
RTN = Recipe(scheme="w4a16_g16", lm_head="w4a16_g16").with_calibration(samples=4, sequence_length=64)
TIED = RTN.model_copy(update={"embedding": "tied"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a model whose embedding is tied to its output projection, and of one where it is not."""

    def made(family):
        folder = save_model(family, tmp_path_factory.mktemp(family), intermediate_size=512)
        write_word_tokenizer(folder, 128)
        return folder

    return {"tied": made("llama_bias"), "untied": made("llama")}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


@pytest.mark.parametrize("kind, recipe", [
    ("tied", TIED), pytest.param("untied", RTN, marks=pytest.mark.slow),
    pytest.param(
        "untied", Recipe(scheme="w4a16_g16", lm_head="w4a16_g16", embedding="w4a16_g16"), marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_it_is_closer_than_one_scheme_everywhere_in_no_more_bytes(models, tmp_path, kind, recipe):
    model, out = models[kind], tmp_path / "auto"
    export(model, recipe, out_dir=tmp_path / "plain")
    plain = validate(tmp_path / "plain", model, text=TEXT, windows=4, window=64).logits
    found = qexport.export_auto(model, recipe, out_dir=out, max_bytes=size_of(tmp_path / "plain"), **MEASURED)
    assert found.export.folder == out and size_of(out) <= size_of(tmp_path / "plain")
    assert len(set(found.schemes.values())) > 1
    assert found.logits.kl_mean < plain.kl_mean
    again = validate(out, model, text=TEXT, windows=4, window=64).logits
    assert (again.kl_mean, again.perplexity) == (found.logits.kl_mean, found.logits.perplexity)
    kept = json.loads((out / "report.json").read_text())["auto"]
    assert kept == found.as_dict() and kept["bytes"] == size_of(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["auto", "plain"]


@pytest.mark.slow
def test_a_recipes_own_formats_are_among_the_choices(models, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuTarget, "candidates", ("w4a16_g64", "w8a16_g64"))
    recipe = Recipe(scheme="nvfp4", lm_head="w8a16_fp8", overrides=[{"match": "*.0.*", "scheme": "ternary_g32"}])
    found = qexport.export_auto(models["untied"], recipe, out_dir=tmp_path / "auto", max_kl=0.02, **MEASURED)
    assert "nvfp4" in found.schemes.values()  # 8-bit integers are as large as 8-bit floats, and nearer
    assert found.logits.kl_mean <= 0.02
    assert validate(tmp_path / "auto", models["untied"], text=TEXT, windows=4, window=64).problems == ()


@pytest.mark.slow
def test_a_captured_model_stays_as_it_is_and_gives_the_same(models, tmp_path):
    captured = capture_model(models["untied"])
    before = [list(block.inputs) for block in captured.blocks]
    asked = dict(recipe=RTN, max_kl=1.0, text=TEXT, windows=1, window=32, calibration="random")
    first = qexport.export_auto(captured, out_dir=tmp_path / "captured", **asked)
    assert [list(block.inputs) for block in captured.blocks] == before
    second = qexport.export_auto(models["untied"], out_dir=tmp_path / "folder", **asked)
    assert first.schemes == second.schemes
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "captured" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_the_folder_says_how_to_get_the_same_again(models, tmp_path, monkeypatch):
    """Though what the output projection reads was seen once for all of its exports."""
    seen, find = [], calibrating.seen_by_projection
    monkeypatch.setattr(calibrating, "seen_by_projection", lambda *given: seen.append(given) or find(*given))
    recipe = TIED.model_copy(update={"weights": section("weights", method="gptq")})
    found = qexport.export_auto(models["tied"], recipe, out_dir=tmp_path / "auto", max_bytes=210_000, **MEASURED)
    assert found.exports > 1 and len(seen) == 1
    again = export(models["tied"], tmp_path / "auto" / "recipe.yaml", out_dir=tmp_path / "again")
    assert {entry.name: entry.scheme for entry in again.manifest.linears}.items() <= found.schemes.items()
    first, second = (folder / "model.onnx.data" for folder in (tmp_path / "auto", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_what_the_recipe_keeps_in_float_stays_float(models, tmp_path):
    recipe = RTN.model_copy(update={"overrides": (Override(match="*o_proj", scheme="float"),)})
    size = size_of(export(models["untied"], recipe, out_dir=tmp_path / "plain").folder)
    found = qexport.export_auto(models["untied"], recipe, out_dir=tmp_path / "auto", max_bytes=size, **MEASURED)
    assert len(found.schemes) == 2 * 6 + 1
    assert not [name for name in found.schemes if name.endswith("o_proj")]


@pytest.mark.slow
@pytest.mark.parametrize("most", [0.2, 0.02])
def test_a_kl_asked_for_is_met_with_fewer_bytes_than_the_closest(models, tmp_path, most):
    found = qexport.export_auto(models["tied"], TIED, out_dir=tmp_path / "auto", max_kl=most, **MEASURED)
    assert found.logits.kl_mean <= most
    closest = export(models["tied"], Recipe(scheme="w8a16_g32", lm_head="w8a16_g32", embedding="tied"),
                     out_dir=tmp_path / "closest")  # fmt: skip
    assert size_of(tmp_path / "auto") < size_of(closest.folder)


@pytest.mark.parametrize(
    "bounds, says",
    [
        ({}, "either the most bytes or the largest KL"),
        ({"max_bytes": 10**6, "max_kl": 0.1}, "either the most bytes or the largest KL"),
        ({"max_kl": 0}, "only the float model has a KL of 0"),
        ({"max_bytes": 1000}, "too few: with the smallest schemes the file takes about"),
        ({"max_kl": 1e-9}, "not met"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(models, tmp_path, bounds, says):
    with pytest.raises(InputError, match=says):
        qexport.export_auto(models["tied"], TIED, out_dir=tmp_path / "auto", **bounds, **MEASURED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["w8a8_dyn", "w8a8_static", "w4a16_pc"])
def test_schemes_without_a_ladder_are_refused(models, tmp_path, recipe):
    with pytest.raises(RecipeError, match="schemes are chosen among"):
        qexport.export_auto(models["untied"], recipe, out_dir=tmp_path / "auto", max_bytes=10**6, **MEASURED)


@pytest.mark.slow
def test_for_cuda_it_takes_what_the_fast_kernels_take(models, tmp_path):
    found = qexport.export_auto(
        models["untied"], RTN, out_dir=tmp_path / "auto", max_bytes=175_000, target="cuda", provider=CPU,
        **MEASURED,
    )  # fmt: skip
    assert not [scheme for scheme in found.schemes.values() if "asym" in scheme or "g16" in scheme.split("_")]
