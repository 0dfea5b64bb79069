"""The method that passes/README.md writes, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from helpers.pass_runs import block_of
from qexport.errors import RecipeError
from qexport.graph.edit import get_tensor
from qexport.passes.base import Pipeline
from qexport.plan.linear_plan import make_plan
from qexport.quant.affine import weight_scales
from qexport.quant.formats import IntegerFormat, Scheme
from qexport.recipe.recipe import Recipe

README = (Path(__file__).parents[2] / "passes" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def registered():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@method(" in block)
    exec(compile(code, "passes/README.md", "exec"), {"__name__": "powers_of_two"})


@pytest.mark.parametrize("up", [True, False])
def test_the_method_of_the_readme_makes_what_it_says(up):
    recipe = Recipe(scheme="w4a16_g32", weights={"method": "powers_of_two", "up": up})
    block = block_of(torch.nn.Sequential(torch.nn.Linear(64, 8)), width=64)
    weight = get_tensor(block, "0.weight")
    plan = {p.name: p for p in make_plan([("", block.graph)], lambda name: Scheme.parse(recipe.scheme))}
    Pipeline(recipe.weights.passes(plan)).run(block, lambda module, wanted: {})
    made, exact = get_tensor(block, "0.weight_scale").t(), weight_scales(weight, IntegerFormat(4, 32))[0]
    assert torch.equal(made.log2(), made.log2().round())
    ratio = made / exact
    assert ratio.min() >= (1 if up else 0.5**0.5 - 1e-6) and ratio.max() < (2 if up else 2**0.5 + 1e-6)


def test_its_section_is_read_as_it_says():
    for wrong, message in (
        ({"up": "maybe"}, r"^weights\.up: input should be a valid bool"),
        ({"damp": 0.1}, "of diffq, gptq"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe(scheme="w4a16_g32", weights={"method": "powers_of_two", **wrong})
    with pytest.raises(RecipeError, match="powers_of_two has no zero points"):
        Recipe(scheme="w4a16_g32_asym", weights={"method": "powers_of_two"})
    assert "up: true" in Recipe(scheme="w4a16_g32", weights={"method": "powers_of_two"}).to_yaml()
