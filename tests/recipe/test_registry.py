"""How methods are found, chosen and refused; what single methods mean is in test_recipe."""

import ast
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qexport import plugins
from qexport.errors import RecipeError
from qexport.recipe import registry
from qexport.recipe.methods import Branch, Equalization, WeightMethod
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import KINDS, method, methods, section, under

ROOT = Path(__file__).parents[2]
# What an earlier version wrote into an exported folder: the keys of all methods, whichever was chosen.
OLDER = """name: older
scheme: w4a16_g32
weights:
  method: rtn
  damp: 0.01
  act_order: false
  token_norm_power: 0.75
  clip_search: false
  learning_rates: [0.01, 0.03, 0.1]
  steps: 40
smooth: null
kv_cache: null
"""


@pytest.fixture
def registered(monkeypatch):
    """What is registered meanwhile is forgotten."""
    methods()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setattr(registry, "_DEFAULTS", dict(registry._DEFAULTS))


def test_every_kind_has_methods_and_every_file_is_found():
    assert {m.kind for m in methods()} == set(KINDS)
    built_in = {m.__module__ for m in methods() if m.__module__.startswith("qexport.")}
    declaring = {
        ".".join(("qexport", *path.relative_to(ROOT).with_suffix("").parts))
        for path in (ROOT / "passes").rglob("*.py")
        if "\n@method(" in path.read_text(encoding="utf-8")
    }
    assert built_in == declaring


def test_no_file_but_its_own_knows_the_name_of_a_method():
    """Except for the formats of checkpoints that other tools quantized, which some methods gave their names."""
    home = {name: m.__module__ for m in methods() for name in (m.method, m.key) if m.__module__.startswith("qexport.")}
    del home["weights"]  # the one section that every recipe has
    found = []
    for path in [*(ROOT / "qexport").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        module = ".".join(("qexport", *path.relative_to(ROOT).with_suffix("").parts)).replace(
            "qexport.qexport", "qexport"
        )
        if module.startswith("qexport.models."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.value if isinstance(node, ast.Constant) else None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "recipe":
                name = node.attr
            if isinstance(name, str) and home.get(name, module) != module:
                found.append(f"{module}:{node.lineno}: {name}")
    # Methods of one key name it, each in its own file.
    assert [place for place in found if not place.endswith(": smooth")] == []


def test_what_sections_hold_and_how_they_are_written():
    chosen = section("weights", method="gptq", damp=0.02)
    assert chosen.method == "gptq" and chosen.model_dump()["method"] == "gptq" and chosen.damp == 0.02
    assert section("lorc").model_dump() == {"rank": 8, "factors": "float", "shared": False, "weighted": False}
    assert section("smooth") == section("smooth", method="smoothquant") != section("smooth", method="awq")
    assert not hasattr(section("weights"), "damp")


def test_a_key_without_a_value_is_as_good_as_absent():
    assert Recipe(scheme="w4a16_g32", smooth=None) == Recipe(scheme="w4a16_g32")
    assert Recipe(scheme="w4a16_g32").smooth is None
    with pytest.raises(AttributeError, match="smoooth"):
        Recipe(scheme="w4a16_g32").smoooth  # noqa: B018


def test_a_recipe_with_keys_of_all_methods_names_those_that_do_not_belong(tmp_path):
    file = tmp_path / "older.yaml"
    file.write_text(OLDER)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    keys = {"damp", "act_order", "token_norm_power", "learning_rates", "steps"}
    *others, last = sorted(name for name, m in under("weights").items() if keys & set(m.model_fields))
    assert str(caught.value) == (
        f"{file}:5, weights.damp: damp, act_order, token_norm_power, learning_rates and steps are not keys of rtn, but "
        f"of {', '.join(others)} and {last}. Remove them, or take another method"
    )
    file.write_text("scheme: w4a16_g32\nweights: {method: rtn, clip_search: false}\nsmooth: null\nkv_cache: null\n")
    assert Recipe.load(file) == Recipe(name="older", scheme="w4a16_g32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weights": {"damp": 1}},
            r"^weights\.damp: damp is not a key of rtn, but of diffq, gptq, pb_llm and slim_llm\. Remove it",
        ),
        (
            {"smooth": {"method": "lae", "alpha": 1}},
            r"^smooth\.alpha: alpha is not a key of lae, but of awq and smooth",
        ),
        ({"weights": 3}, r"^weights: input should be a valid dictionary or instance of .*, not 3$"),
        ({"weights": {"method": ["rtn"]}}, r"^weights\.method: input should be 'absmean|^weights\.method: .*'rtn'"),
        ({"weights": section("smooth")}, r"^weights: input should be .*, not SmoothQuantSection"),
        ({"lorc": {"method": "lorc"}}, r"^lorc\.method: unknown key\. Keys here are rank, factors, shared, weighted$"),
        ({"lorcs": {}}, r"^lorcs: unknown key\. Did you mean lorc\?$"),
        ({"weights": {"method": "hqq", "zzz": 1}}, r"^weights\.zzz: unknown key\. Keys here are method$"),
        ({"weights": {"metod": "gptq"}}, r"^weights\.metod: unknown key\. Did you mean method\?$"),
    ],
)
def test_a_section_that_is_none_is_explained(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(scheme="w4a16_g32", **fields)


def test_a_name_is_given_once(registered):
    class Mine(Branch):
        def passes(self, plan):
            return []

    with pytest.raises(
        RecipeError, match=r"lorc of branches is registered twice, by qexport\.passes\.branches\.lorc and"
    ):
        method("branches", "lorc")(Mine)
    assert method("branches", "mine")(Mine) is Mine
    assert method("branches", "mine")(Mine) is Mine, "a module that is loaded again"
    assert Recipe(scheme="w4a16_g32", mine={}).mine == Mine()


def test_a_kind_and_a_key_have_to_fit(registered):
    class Mine(Equalization):
        def passes(self, plan):
            return []

    with pytest.raises(
        RecipeError, match=r"Mine is of equalization, not of weights\. Kinds are model, equalization, b"
    ):
        method("weights", "mine")(Mine)
    with pytest.raises(RecipeError, match="^Mine: weights is a key of other methods$"):
        method("equalization", "mine", key="weights")(Mine)
    with pytest.raises(RecipeError, match="^Mine: smooth is a key of other methods$"):
        method("equalization", "smooth")(Mine)
    method("equalization", "mine", key="smooth")(Mine)
    assert Recipe(scheme="w8a8_dyn", smooth={"method": "mine"}).smooth == Mine()
    with pytest.raises(RecipeError, match="fptq and smooth both decide the factors of activations"):
        Recipe(scheme="w8a8_dyn", smooth={"method": "mine"}, fptq={})


def test_a_method_without_passes_cannot_be_made(registered):
    @method("weights", "mine")
    class Mine(WeightMethod):
        pass

    assert under("weights")["mine"] is Mine
    with pytest.raises(TypeError, match="abstract"):
        Recipe(scheme="w4a16_g32", weights={"method": "mine"})


def test_packages_bring_methods_by_an_entry_point(registered, monkeypatch, tmp_path):
    (tmp_path / "brought.py").write_text(
        "from qexport.passes.branches.lorc import LoRCSection\n"
        "from qexport.recipe.registry import method\n\n\n"
        "@method('branches', 'brought')\nclass Brought(LoRCSection):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("brought", "brought", registry.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "qexport.methods" else [])
    monkeypatch.setattr(registry, "_discovered", False)
    assert Recipe(scheme="w4a16_g32", brought={"rank": 3}).brought.rank == 3
    points[:] = [EntryPoint("broken", "no_such_module_anywhere", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "_discovered", False)
    for _ in range(2):
        with pytest.raises(
            RecipeError, match="^no_such_module_anywhere: its methods cannot be imported: ModuleNotFound"
        ):
            methods()
