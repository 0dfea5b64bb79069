"""Recipes as a user writes them: presets, scheme names, YAML files, and what goes wrong."""

import pytest
import yaml

from qexport.errors import RecipeError
from qexport.quant.formats import (
    PER_CHANNEL,
    ActivationFormat,
    ExpandedFormat,
    IntegerFormat,
    Scheme,
    full_name,
)
from qexport.quant.formats.codebooks import FP4, NF4
from qexport.recipe.catalogue import WISHES
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section

FIELDS = list(Recipe.model_fields)
PRESETS = {
    "as_stored": ("float", "as_stored", None),
    "w4a16_g32": ("w4a16_g32", "gptq", None),
    "w4a16_g32_rtn": ("w4a16_g32", "rtn", None),
    "w4a16_g32_int8_prompts": ("w4a16_g32", "gptq", "smoothquant"),
    "w4a16_g64": ("w4a16_g64", "gptq", None),
    "w4a16_g128": ("w4a16_g128", "gptq", None),
    "w4a16_g128_rtn": ("w4a16_g128", "rtn", None),
    "w4a16_g32_asym": ("w4a16_g32_asym", "gptq", None),
    "w8a16": ("w8a16_g32", "rtn", None),
    "w8a8_dyn": ("w8a8_dyn", "gptq", "smoothquant"),
    "w8a8_static": ("w8a8_static", "rtn", "smoothquant"),
    "w4a8_g128": ("w4a8_g128", "gptq", "smoothquant"),
    "w4a8": ("w4a8", "gptq", "smoothquant"),
    "crossquant_w8a8": ("w8a8_dyn", "gptq", "crossquant"),
    "crossquant_w8a8_paper": ("w8a8_dyn", "rtn", "crossquant"),
    "crossquant_w4a8": ("w4a8_g128_int", "gptq", "crossquant"),
    "compact": ("w4a16_g128_asym_s8", "gptq", None),
    "compact_tuned": ("w4a16_g128_asym_s8", "gptq", None),
    "compact_nf4": ("nf4_g16_s8", "gptq", None),
    "compact_5bit": ("w5a16_g32_s8", "gptq", None),
    "compact_6bit": ("w6a16_g64_s8", "gptq", None),
    "balanced": ("w4a16_g64_asym_s8", "gptq", None),
    "closest": ("w8a16_g32", "rtn", None),
    "server": ("w8a8_dyn", "gptq", "smoothquant"),
    "encoder": ("w8a8_dyn", "rtn", "smoothquant"),
    "crossquant_w4a4": ("w4a4_g128_int", "gptq", "crossquant"),
    "rotated_w4a4": ("w4a4_g128_int", "gptq", None),
    "fptq": ("w4a8_g128_int", "gptq", "fptq"),
    "llm_int8": ("w8a8_dyn", "rtn", "llm_int8"),
    "nf4": ("nf4", "rtn", None),
    "mxfp4": ("mxfp4", "gptq", None),
    "nvfp4": ("nvfp4", "gptq", None),
    "fp4": ("fp4", "rtn", None),
    "w8a8_static_lae": ("w8a8_static", "rtn", "lae"),
    "w4a16_g64_awq": ("w4a16_g64", "rtn", "awq"),
    "w4a16_g64_hqq": ("w4a16_g64_asym", "hqq", None),
    "w4a16_g64_autoround": ("w4a16_g64", "autoround", None),
    "w4a16_g64_zq_local": ("w4a16_g64", "zq_local", None),
    "w4a16_g64_zq_global": ("w4a16_g64", "zq_global", None),
    "w4a16_g64_lorc": ("w4a16_g64", "gptq", "lorc"),
    "w3a16_g64": ("w3a16_g64", "gptq", "lorc"),
    "w2a16_g64": ("w2a16_g64_asym", "gptq", "lorc"),
}


# What else is quantized: the output projection and the table of embeddings.
TABLES = {
    "compact": ("w4a16_g64_asym_s8", "tied"), "compact_nf4": ("w4a16_g16_s8", "tied"),
    "compact_5bit": ("w5a16_g32_s8", "tied"), "compact_6bit": ("w5a16_g16_s8", "tied"),
    "balanced": ("w4a16_g64_asym_s8", "auto"),
    "closest": ("w8a16_g32", "auto"), "server": ("w8a16_g32", "auto"), "encoder": ("float", "auto"),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_the_presets_are_these_and_have_descriptions():
    presets = Recipe.presets()
    assert list(presets) == sorted(PRESETS)
    assert all(len(description) > 20 for description in presets.values())


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    recipe = Recipe.load(name)
    scheme, method, section = PRESETS[name]
    assert (recipe.name, recipe.scheme, recipe.weights.method) == (name, scheme, method)
    sections = [n for n in ("smooth", "crossquant", "fptq", "llm_int8", "lorc") if getattr(recipe, n) is not None]
    assert [recipe.smooth.method if n == "smooth" else n for n in sections] == ([section] if section else [])
    family = name.removesuffix("_tuned")
    assert (recipe.lm_head, recipe.embedding) == TABLES.get(family, ("float", "float"))


def test_a_wish_names_its_preset():
    assert [Recipe.load(wish.name).name for wish in WISHES] == [wish.preset for wish in WISHES]
    assert {wish.preset for wish in WISHES} <= set(PRESETS)


def test_an_override_for_everything_leaves_a_kept_output_projection():
    everything = [{"match": "*", "scheme": "w8a16_g32"}]
    kept = Recipe(scheme="w4a16_g32", overrides=everything)
    assert kept.scheme_for("lm_head") is None and kept.scheme_for("model.layers.0.q").name == "w8a16_g32"
    assert Recipe(scheme="w4a16_g32", lm_head="w4a16_g32", overrides=everything).scheme_for("lm_head").weight.bits == 8
    named = Recipe(scheme="w4a16_g32", overrides=[{"match": "*head", "scheme": "w8a16_g32"}])
    assert named.scheme_for("lm_head").name == "w8a16_g32"


def test_the_fewer_the_scales_of_weights_and_the_more_of_activations_the_less_is_smoothed():
    alpha = {name: Recipe.load(name).smooth.alpha for name in ("w8a8_static", "w8a8_dyn", "w4a8_g128", "w4a8")}
    assert alpha["w8a8_static"] > alpha["w8a8_dyn"] >= alpha["w4a8_g128"] > alpha["w4a8"]


@pytest.mark.parametrize("name", [n for n, (scheme, _, part) in PRESETS.items() if scheme == n and part != "lorc"])
def test_a_preset_says_what_its_scheme_alone_means(name):
    """Two ways to the same scheme must not drift apart."""
    alone = Recipe._from_scheme(Scheme.parse(name))
    assert alone.model_copy(update={"description": ""}) == Recipe.load(name).model_copy(update={"description": ""})


@pytest.mark.parametrize(
    ("name", "scheme", "method", "alpha"),
    [
        ("w4a16_g64_asym", "w4a16_g64_asym", "gptq", None),
        ("W4A16", "w4a16_g128", "gptq", None),
        ("W4A16_ASYM", "w4a16_g128_asym", "gptq", None),
        ("w4a16_pc", "w4a16_pc", "gptq", None),
        ("W8A16", "w8a16_g32", "rtn", None),
        ("w8a16_g128_asym", "w8a16_g128_asym", "rtn", None),
        ("W8A8", "w8a8_dyn", "gptq", 0.5),
        ("w8a8_pt_dyn", "w8a8_pt_dyn", "gptq", 0.5),
        ("w8a8_pt_static", "w8a8_pt_static", "rtn", 0.8),
        ("w4a8_g64", "w4a8_g64", "gptq", 0.5),
        ("w4a8_pc_static", "w4a8_pc_static", "gptq", 0.4),
    ],
)
def test_scheme_name_alone(name, scheme, method, alpha):
    recipe = Recipe.load(name)
    assert (recipe.scheme, recipe.weights.method) == (scheme, method)
    assert (recipe.smooth.alpha if recipe.smooth else None) == alpha


def test_short_scheme_names_mean_the_same_in_every_key():
    recipe = Recipe(scheme="W4A16", lm_head="w8a16", overrides=[{"match": "*", "scheme": "w8a8"}])
    assert (recipe.scheme, recipe.lm_head, recipe.overrides[0].scheme) == ("w4a16_g128", "w8a16_g32", "w8a8_dyn")
    assert full_name("W4A16") == recipe.scheme


def test_file_with_defaults(write):
    recipe = Recipe.load(write("scheme: w4a16_g32\n"))
    assert recipe == Recipe(name="mine", scheme="w4a16_g32")
    assert recipe.weights == section("weights", method="rtn") and recipe.smooth is None
    assert recipe.calibration == CalibrationSpec(source="self", samples=32, sequence_length=256, seed=0, batch_size=4)
    assert recipe.accuracy_level == 4 and recipe.embedding == "float"


def test_exponents_without_a_point_are_numbers(write):
    """YAML 1.1 reads 1e-3 as a string."""
    assert Recipe.load(write("scheme: w4a16_g32\nweights: {method: gptq, damp: 1e-3}\n")).weights.damp == 1e-3


def test_a_file_is_found_by_string_by_path_and_without_a_suffix(write, monkeypatch):
    path = write("scheme: w8a8_dyn\n")
    monkeypatch.chdir(path.parent)
    assert Recipe.load("mine.yaml") == Recipe.load(str(path)) == Recipe.load(path)
    write("scheme: w8a8_dyn\n", "plain")
    assert Recipe.load("plain").name == "plain"
    write("scheme: w8a8_dyn\n", "w4a16_g32")
    assert Recipe.load("w4a16_g32").scheme == "w4a16_g32", "a file must not hide a preset"


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name, write):
    recipe = Recipe.load(name)
    assert Recipe.load(write(recipe.to_yaml())) == recipe


def test_yaml_round_trip_of_everything(write):
    recipe = Recipe(
        name="grüße: 1",
        description="# not a comment",
        scheme="w8a8_static",
        lm_head="w4a16_g32",
        weights={"method": "gptq", "damp": 0.02, "act_order": True, "token_norm_power": 0, "clip_search": True},
        smooth={"alpha": 0.8},
        activations={"observer": "percentile", "percentile": 99.9},
        overrides=[Override(match="*.down_proj", scheme="float"), Override(match="*[0]*", scheme="w8a8_dyn")],
        calibration={"source": "datasets:a/b:train[:10]:text", "samples": 3, "sequence_length": 7, "seed": 9},
        accuracy_level=1,
    )
    assert Recipe.load(write(recipe.to_yaml())) == recipe


def test_schemes_of_linears():
    recipe = Recipe(
        scheme="w4a16_g32",
        lm_head="w8a16",
        overrides=[
            {"match": "model.layers.0.*", "scheme": "float"},
            {"match": "*.down_proj", "scheme": "w8a8_dyn"},
        ],
    )
    int4 = Scheme("w4a16_g32", IntegerFormat(4, 32), None)
    int8 = Scheme("w8a8_dyn", IntegerFormat(8, PER_CHANNEL), ActivationFormat("dynamic"))
    assert recipe.scheme_for("model.layers.1.mlp.up_proj") == int4
    assert recipe.scheme_for("model.layers.1.mlp.down_proj") == int8
    assert recipe.scheme_for("model.layers.0.mlp.down_proj") is None, "the first match wins"
    assert recipe.scheme_for("lm_head") == Scheme("w8a16_g32", IntegerFormat(8, 32), None)
    assert recipe.scheme_for("model.layers.1.mlp.DOWN_PROJ") == int4, "names have case"


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head", "embed_out"])
def test_the_output_projection_stays_float_unless_named(name):
    assert Recipe(scheme="w4a16_g32").scheme_for(name) is None
    override = {"match": name, "scheme": "w8a16"}
    assert Recipe(scheme="w4a16_g32", overrides=[override]).scheme_for(name).name == "w8a16_g32"


def test_overrides_that_decide_nothing():
    patterns = ["*.q_proj", "*.gate", "*_proj", "*.0.v_proj"]
    recipe = Recipe(scheme="w4a16_g32", overrides=[{"match": match, "scheme": "float"} for match in patterns])
    assert recipe.unmatched_overrides(["a.0.q_proj", "a.0.v_proj"]) == ["*.gate", "*.0.v_proj"]


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"scheme": "w4a16_g32"}, False),
        ({"scheme": "w8a8_dyn"}, False),
        ({"scheme": "w4a16_g32", "weights": {"clip_search": True}}, False),
        ({"scheme": "w4a16_g32", "weights": {"method": "gptq"}}, True),
        ({"scheme": "w8a8_dyn", "smooth": {"alpha": 0.5}}, True),
        ({"scheme": "w8a8_static"}, True),
        ({"scheme": "w4a16_g32", "lm_head": "w8a8_static"}, True),
        ({"scheme": "w4a16_g32", "overrides": [{"match": "*", "scheme": "w8a8_static"}]}, True),
    ],
)
def test_needs_calibration(fields, needs):
    assert Recipe(**fields).needs_calibration is needs


def test_schemes_of_the_embedding():
    for name, known in (("W4A16", "w4a16_g128"), ("w8a16", "w8a16_g32"), ("TIED", "tied"), ("w3a16_g64", "w3a16_g64")):
        assert Recipe(scheme="w4a16_g32", lm_head="w4a16_g32", embedding=name).embedding == known
    later = [{"match": "lm_head", "scheme": "w8a16_g32"}]
    assert Recipe(scheme="w4a16_g32", overrides=later, embedding="tied").embedding == "tied", "the plan decides"


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load("w4a16_g32").scheme = "w8a16"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("scheme: w4a16_g32\nlmhead: float\n", 2, r"lmhead: unknown key\. Did you mean lm_head\?"),
        ("scheme: w4a16_g32\nweights:\n  method: gptq\n  damping: 1\n", 4, r"weights\.damping: .*Did you mean damp\?"),
        ("scheme: w8a8_dyn\nsmooth:\n  strength: 1\n", 3, r"smooth\.strength: .*Keys here are method, alpha, explicit"),
        ("scheme: w4a16_g32\noverrides:\n- macth: x\n  scheme: float\n", 3, r"overrides\.0\.macth: .*mean match\?"),
        ("scheme: w4a16_g32\noverrides:\n- match: x\n", 3, r"overrides\.0\.scheme: this key is missing"),
        ("scheme: w4a16_g32\noverrides:\n- match: x\n  scheme: w3\n", 4, r"overrides\.0\.scheme: unknown scheme 'w3'"),
        ("\n\nscheme: w4a16_g33\n", 3, r"scheme: .*groups of 33\. Use 16, 32"),
        ("scheme: flaot\n", 1, "scheme: unknown scheme 'flaot'"),
        ("scheme: 4\n", 1, "scheme: input should be a valid string, not 4"),
        ("scheme: w4a16_g32\nweights: {method: gptq, damp: 0}\n", 2, r"weights\.damp: .*greater than 0"),
        ("scheme: w4a16_g32\nweights: {method: gptq, damp: .nan}\n", 2, r"weights\.damp: .*not nan"),
        ("scheme: w4a16_g32\nweights: {method: awq}\n", 2, r"weights\.method: .*'gptq', 'hqq'.*'rtn'.* not 'awq'"),
        ("scheme: w8a8_dyn\nsmooth: {alpha: 1.5}\n", 2, r"smooth\.alpha: .*not a number from 0 to 1"),
        ("scheme: w4a16_g32\ncalibration: {samples: 0}\n", 2, r"calibration\.samples: .*greater than or equal to 1"),
        ("scheme: w4a16_g32\naccuracy_level: 2\n", 2, "accuracy_level: input should be 1 or 4, not 2"),
        ("scheme: w4a16_g32\nscheme: w8a16\n", 2, "scheme is already given in line 1"),
        ("scheme: w4a16_g32\nweights: [a\n", 3, "this is not YAML: "),
        ("scheme: *here\n", 0, "cannot use YAML aliases"),
        ("- scheme\n", 0, "not a mapping"),
        ("", 0, "not a mapping"),
        ("name: x\n", 0, "scheme: this key is missing"),
        ("scheme: w4a16_g32\nembedding: w8a8_dyn\n", 2, r"embedding: w8a8_dyn is not a scheme for an embedding"),
        ("scheme: w4a16_g32\nembedding: w4a16_pc\n", 2, r"w4a16_pc is not a scheme .*Use w4a16_.*tied, auto, or float"),
        ("scheme: w4a16_g32\nembedding: nf4\n", 2, r"embedding: nf4 is not a scheme for an embedding"),
        ("scheme: w4a16_g32\nembedding: tide\n", 2, r"embedding: unknown scheme 'tide'"),
        (
            "scheme: w4a16_g32\nembedding: tied\n",
            0,
            r"embedding: tied reads the codes of lm_head.*lm_head is float\. Set",
        ),
        ("scheme: w4a16_g32\nlm_head: w8a8_dyn\nembedding: tied\n", 0, r"in groups, and lm_head is w8a8_dyn"),
        ("scheme: w4a16_g32\nsmooth: {}\n", 0, r"w4a16_g32 keeps them in float\. Remove smooth"),
    ],
)
def test_a_wrong_file_is_explained(text, line, message, write):
    path = write(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert caught.value.place.startswith(f"{path}:{line}" if line else str(path))
    assert bool(line) == str(caught.value.place).startswith(f"{path}:")


def test_a_file_nested_too_deeply_is_no_crash(write):
    with pytest.raises(RecipeError, match=r"mine\.yaml:1: more than 16 mappings and lists within each other"):
        Recipe.load(write("[" * 2000))


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: byte 8 is not UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        Recipe.load("none.yaml")
    with pytest.raises(RecipeError, match="is not a file"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16_g32_rnt", r"unknown scheme 'w4a16_g32_rnt'\. Did you mean w4a16_g32_rtn\?"),
        ("w4a16_g8", "groups of 8"),
        ("w5a16", "5-bit weights"),
        ("4bit-please", "there is no preset, scheme or file '4bit-please'. Presets are smallest, balanced, "),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(name)


def test_python_gets_the_same_errors():
    said = r"^weights\.dampp: unknown key\. Did you mean damp, a key of diffq, gptq, pb_llm and slim_llm\?$"
    with pytest.raises(RecipeError, match=said):
        Recipe(scheme="w4a16_g32", weights={"dampp": 1})
    with pytest.raises(RecipeError, match=r"^weights\.actorder: unknown key\. Did you mean act_order\?$"):
        section("weights", method="gptq", actorder=True)
    with pytest.raises(RecipeError, match="^samples: input should be greater than or equal to 1, not 0$"):
        CalibrationSpec(samples=0)


def test_to_yaml_is_plain_yaml_in_the_order_of_the_fields():
    data = yaml.safe_load(Recipe.load("w8a8_static").to_yaml())
    behind = FIELDS.index("weights") + 1
    assert list(data) == [*FIELDS[:behind], "smooth", *FIELDS[behind:]]
    assert data["weights"] == {"method": "rtn", "clip_search": False}, "and no key of another method"
    assert data["smooth"] == {"method": "smoothquant", "alpha": 0.8, "explicit": False}
    assert data["activations"] == {
        "observer": "absmax", "percentile": 99.99, "token_clip": 1.0, "only_kernel": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "w8a8_dyn", "smooth": {}, "crossquant": {}}, "crossquant and smooth both decide"),
        ({"scheme": "w4a16_g32", "crossquant": {}}, "crossquant makes activations easier"),
        ({"scheme": "w4a16_g32", "fptq": {}}, "fptq makes activations easier"),
        ({"scheme": "w4a16_g32", "llm_int8": {}}, "llm_int8 makes activations easier"),
        ({"scheme": "w4a8_g32", "crossquant": {"round_weights": "before_fold"}}, "does not work with w4a8_g32"),
        ({"scheme": "w8a8_dyn", "crossquant": {"alpha": "search", "row_scale": "dynamic"}}, "dynamic folds nothing"),
        ({"scheme": "w8a8_dyn", "fptq": {"static_up_to": 9, "dynamic_from": 3}}, "dynamic_from is below"),
        ({"scheme": "w8a8_dyn", "crossquant": {"alpha": "best"}}, "not a number from 0 to 1"),
        ({"scheme": "w4a16_g32", "weights": {"method": "zq_local", "learning_rates": [0.1, 0]}}, "above 0"),
        ({"scheme": "w4a16_g32", "lorc": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**fields)


def test_awq_scales_weights_of_float_activations():
    assert Recipe(scheme="w4a16_g64", smooth={"method": "awq", "alpha": "search"}).needs_calibration


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("w4a8_g128_int", ExpandedFormat(4, 128), ActivationFormat("dynamic")),
        ("w3a8_g64_asym_static_int", ExpandedFormat(3, 64, False), ActivationFormat("static")),
        ("w4a4", IntegerFormat(4), ActivationFormat("dynamic", 4)),
        ("w2a16_g1024", IntegerFormat(2, 1024), None),
        ("NF4_g128_dq", NF4(128, True), None),
        ("fp4", FP4(64), None),
    ],
)
def test_schemes_of_the_methods(name, weight, activation):
    assert Scheme.parse(name) == Scheme(name.lower(), weight, activation)


@pytest.mark.parametrize(
    "name", ["w4a4_g128", "w2a8", "w2a16", "w8a8_g64", "w8a8_int", "w4a8_asym", "nf4_g48", "nf4_asym"]
)
def test_schemes_that_nothing_runs(name):
    with pytest.raises(RecipeError):
        Scheme.parse(name)
