"""The main directions of a weight take a float path before the rest is rounded."""

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of, collecting
from qexport.errors import RecipeError
from qexport.graph.edit import get_tensor
from qexport.graph.sites import linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Pipeline
from qexport.passes.branches.lorc import deployed_weight, products_of
from qexport.passes.branches.svdquant import SVDQuant
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.quant.token_clip import CLIPS, TokenClip
from qexport.recipe.recipe import Recipe

X = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(5))


class Two(nn.Module):
    """Two linears that read one value, one of them biased."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 48, False), nn.Linear(64, 32)

    def forward(self, x):
        x = torch.tanh(x)
        return self.a(x), self.b(x)


def run(scheme, *steps, large=16.0, token_clip=1.0, **options):
    """The outputs before and after, the account, and the module; a few directions of the weights are large."""
    module = block_of(Two(), 64)
    draws = torch.Generator().manual_seed(1)
    for linear in linears(module.graph):
        weight = get_tensor(module, linear.weight)
        weight += large * torch.randn(len(weight), 2, generator=draws) @ torch.randn(2, 64, generator=draws) / 8
    want = module(X)
    plan = {n.name: LinearPlan(n.name, "", n.shape, Scheme.parse(scheme)) for n in linears(module.graph)}
    passes = [*(step(plan, **options) for step in steps), RoundToNearest(plan)]
    passes.append(QuantizeActivations(plan, measure=True, token_clip=token_clip))
    results = Pipeline(passes).run(module, collecting(X))
    return want, module(X), results, module


def error(want, got):
    return sum(float((g - w).norm() / w.norm()) for w, g in zip(want, got, strict=True))


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"int8": True}, {"turns": 0}])
def test_the_branch_takes_most_of_the_error_of_few_bits(options):
    want, plain, *_ = run("w4a4_g32_int")
    _, got, results, _ = run("w4a4_g32_int", SVDQuant, rank=4, **options)
    assert error(want, got) < 0.65 * error(want, plain)
    assert [note.site for note in results["SVDQuant"].changed] == ["a", "b"]
    assert all(note.data["norm left"] < 0.6 for note in results["SVDQuant"].changed)


def test_what_is_rounded_is_the_rest():
    want, got, _, module = run("w8a16_g32", SVDQuant, rank=4)
    _, _, _, plain = run("w8a16_g32")
    for name, nodes in products_of(module, {"a": None, "b": None}).items():
        whole = deployed_weight(plain, products_of(plain, {name: None})[name])
        assert deployed_weight(module, nodes).norm() < 0.5 * whole.norm()
    assert error(want, got) < 0.02


def test_turns_only_lower_the_error():
    errors = [error(*run("w4a16_g32", SVDQuant, rank=4, turns=turns)[:2]) for turns in (0, 6)]
    assert errors[1] <= errors[0] * 1.001


def test_factors_in_int8_have_no_form_beside_a_second_one_for_prompts():
    with pytest.raises(RecipeError, match="set svdquant to factors: float"):
        Recipe(scheme="w4a16_g32", svdquant={"factors": "int8"}, prefill="int8")


@pytest.mark.parametrize("bits, least, most", [("w4a4", 0.6, 0.92), ("w8a8_dyn", 0.96, 1.0)])
def test_few_codes_want_a_smaller_range(bits, least, most):
    fmt = Scheme.parse(bits).activation
    seen = TokenClip(fmt)
    x = torch.randn(256, 576, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 256)[:, None]
    seen.update(x)
    assert least <= seen.clip() <= most and seen.clip() in CLIPS
    step = x.abs().amax(1, keepdim=True) * seen.clip() / fmt.qmax
    clipped = (x / step).round().clamp(-fmt.qmax, fmt.qmax) * step
    plain = (x / (step / seen.clip())).round() * step / seen.clip()
    assert (clipped - x).square().sum() <= (plain - x).square().sum()


def test_a_searched_range_lowers_the_error_of_four_bits():
    want, plain, *_ = run("w4a4_g32_int", large=0.0)
    _, got, results, _ = run("w4a4_g32_int", large=0.0, token_clip="search")
    clips = [note.data["clip"] for note in results["QuantizeActivations"].changed]
    assert all(clip < 1 for clip in clips) and error(want, got) < error(want, plain)
