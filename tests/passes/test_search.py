"""The search by output error against the same error in float64, and against really running every candidate."""

import math

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of
from qexport.calibrate.block_activations import Stream, collect
from qexport.errors import NumericsError
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Pipeline
from qexport.passes.equalization.awq import AWQ
from qexport.passes.equalization.crossquant import CrossQuant
from qexport.passes.equalization.scale_search import ALPHAS, best
from qexport.passes.equalization.smoothquant import SmoothQuant
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme

K = 32
SCHEMES = ["w4a16_g16", "w4a16_g16_asym", "w3a16_pt", "w8a8_dyn", "w8a8_static", "w4a4", "w4a8_g16_int"]


def case(seed=0, tokens=40):
    """Rows with features of different size, two weights, and factors of a candidate."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(K, generator=generator).exp() * torch.logspace(-1, 1, K)
    rows = torch.randn(tokens, K, generator=generator) * size
    return rows, [torch.randn(n, K, generator=generator) for n in (7, 12)], lambda alpha: size**alpha


def slow_weight(w, fmt):
    """Nearest codes in float64, group by group."""
    groups = w.reshape(1, 1, -1) if fmt.group_size == -1 else w.reshape(len(w), -1, fmt.group_size or w.shape[1])
    if fmt.symmetric:
        step, zero = groups.abs().amax(-1, keepdim=True) / fmt.qmax, 0
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / fmt.qmax
        zero = torch.round(-low / step)
    codes = (torch.round(groups / step) + zero).clamp(fmt.qmin, fmt.qmax)
    return ((codes - zero) * step).reshape(w.shape)


def slow_error(rows, s, weights, schemes, reach, unscaled=False, alpha=None):
    x, s, total = rows.double(), s.double(), 0.0
    for w, scheme in zip((w.double() for w in weights), schemes, strict=True):
        if scheme is None:
            continue
        folded = slow_weight(w, scheme.weight) * s if unscaled else slow_weight(w * s, scheme.weight)
        if scheme.weight.folds_columns:
            step = folded.abs().amax(1, keepdim=True) / 127
            folded = torch.round(folded / step) * step
        value = x / s
        if (fmt := scheme.activation) is not None:
            own = value.abs().amax(1, keepdim=True)
            if fmt.kind == "static":
                own = (reach / s).max()
            elif alpha is not None:
                own = torch.maximum(x.abs().amax(1, keepdim=True) ** alpha, own)
            value = torch.round(value / own * fmt.qmax).clamp(-fmt.qmax, fmt.qmax) * own / fmt.qmax
        total += float((value @ folded.T - x @ w.T).square().sum())
    return total


@pytest.mark.parametrize(
    "name, unscaled", [*((name, False) for name in SCHEMES), *((name, True) for name in SCHEMES if "a16" not in name)]
)
def test_the_candidate_and_its_error_are_those_of_a_brute_force_search(name, unscaled):
    rows, weights, factors_of = case()
    schemes, reach = [Scheme.parse(name)] * 2, 1.1 * rows.abs().amax(0)
    found = best(ALPHAS, factors_of, rows, weights, schemes, absmax=reach, weights_unscaled=unscaled)
    errors = {a: slow_error(rows, factors_of(a), weights, schemes, reach, unscaled) for a in ALPHAS}
    assert found.value == min(errors, key=errors.get)
    assert found.error == pytest.approx(errors[found.value], rel=0.01)
    assert found.without == pytest.approx(slow_error(rows, torch.ones(K), weights, schemes, reach), rel=0.01)
    assert len(set(errors.values())) == len(ALPHAS)


def test_with_the_papers_row_scale_the_candidate_is_its_power():
    rows, weights, _ = case()
    reach = rows.abs().amax(0)
    schemes, factors_of = [Scheme.parse("w8a8_dyn")] * 2, lambda a: reach ** (1 - a)
    found = best(ALPHAS, factors_of, rows, weights, schemes, paper_rows=True)
    errors = {a: slow_error(rows, factors_of(a), weights, schemes, reach, alpha=a) for a in ALPHAS}
    assert found.value == min(errors, key=errors.get)
    assert found.error == pytest.approx(errors[found.value], rel=0.01)
    assert found.error > 1.02 * best(ALPHAS, factors_of, rows, weights, schemes).error


def test_linears_in_float_do_not_count():
    rows, weights, factors_of = case()
    scheme = Scheme.parse("w4a8_g16")
    both = best(ALPHAS, factors_of, rows, [*weights, 100 * weights[0]], [scheme, scheme, None])
    assert both == best(ALPHAS, factors_of, rows, weights, [scheme, scheme])
    first, second = (best([0.5], factors_of, rows, [w], [scheme]) for w in weights)
    half = best([0.5], factors_of, rows, weights, [scheme, scheme])
    assert half.error == pytest.approx(first.error + second.error)
    nothing = best(ALPHAS, factors_of, rows, weights, [None, None])
    assert (nothing.value, nothing.error, nothing.helps) == (0, 0, False)


def test_formats_of_different_linears_are_their_own():
    rows, weights, factors_of = case()
    schemes, reach = [Scheme.parse("w8a8_static"), Scheme.parse("w4a16_g16")], rows.abs().amax(0)
    found = best([0.3], factors_of, rows, weights, schemes)
    assert found.error == pytest.approx(slow_error(rows, factors_of(0.3), weights, schemes, reach), rel=0.01)


def test_the_first_of_equals_is_taken_and_no_factor_does_not_help():
    rows, weights, _ = case()
    found = best([0.7, 0.2], lambda a: torch.ones(K), rows, weights, [Scheme.parse("w4a16_g16")] * 2)
    assert found.value == 0.7 and found.error == found.without and not found.helps
    third = best([1], lambda a: torch.full((K,), 1 / 3), rows, weights, [Scheme.parse("w4a16_g16")] * 2)
    assert third.error == pytest.approx(third.without) and not third.helps  # whatever float32 makes of a third
    assert found.data() == {"alpha": 0.7, "error relative to no factor": 1.0}


def test_of_many_tokens_evenly_spaced_ones_are_used():
    rows, weights, factors_of = case(tokens=700)
    schemes = [Scheme.parse("w8a8_dyn")] * 2
    assert best(ALPHAS, factors_of, rows, weights, schemes) == best(ALPHAS, factors_of, rows[::3], weights, schemes)


def test_large_weights_are_worked_on_in_pieces(monkeypatch):
    rows, weights, factors_of = case()
    for name in SCHEMES:
        schemes = [Scheme.parse(name)] * 2
        whole = best(ALPHAS, factors_of, rows, weights, schemes)
        with monkeypatch.context() as patch:
            patch.setattr("qexport.passes.equalization.scale_search._PIECE", 5 * K)
            pieces = best(ALPHAS, factors_of, rows, weights, schemes)
        assert pieces.value == whole.value and pieces.error == pytest.approx(whole.error, rel=1e-4)


def test_codebooks_too():
    rows, weights, factors_of = case()
    found = best(ALPHAS, factors_of, rows, weights, [Scheme.parse("nf4_g16")] * 2)
    assert 0 < found.error < found.without


def test_nan_is_refused():
    rows, weights, factors_of = case()
    rows[3, 4] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        best(ALPHAS, factors_of, rows, weights, [Scheme.parse("w4a16_g16")] * 2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(K), nn.Linear(K, 24), nn.Linear(K, 16)

    def forward(self, x):
        value = self.norm(x)
        return torch.cat([self.left(value), self.right(value)], -1)


def deployed_error(method, scheme, outlier=20.0):
    """The squared error of a block's output after the passes that quantize it, and the note of the method."""
    block, x = block_of(Layer(), K), torch.randn(8, 5, K, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dict(block.named_buffers())["norm.weight"][[3, 17]] *= outlier
        want = block(x)[0].double()
    shapes = {"left": (24, K), "right": (16, K)}
    plan = {name: LinearPlan(name, "", shape, Scheme.parse(scheme)) for name, shape in shapes.items()}

    class Whole:
        inputs = ["x"]
        module = block

    stream = Stream([{"x": x}], [None], {"x": 0})
    step = method(plan)
    passes = [step, RoundToNearest(plan), QuantizeActivations(plan)]
    results = Pipeline(passes).run(block, lambda module, asked: collect(Whole, stream, module, asked), (x,))
    with torch.no_grad():
        error = float((block(x)[0].double() - want).square().sum())
    return error, (results[step.name].changed or results[step.name].skipped)[0]


@pytest.mark.by_default("CrossQuant-*")
@pytest.mark.parametrize(
    "method, scheme",
    [
        (SmoothQuant, "w8a8_dyn"),
        pytest.param(SmoothQuant, "w8a8_static", marks=pytest.mark.slow),
        pytest.param(SmoothQuant, "w4a8_g16", marks=pytest.mark.slow),
        (CrossQuant, "w8a8_dyn"),
        pytest.param(CrossQuant, "w4a8_g16_int", marks=pytest.mark.slow),
        pytest.param(
            lambda plan, alpha: CrossQuant(plan, alpha=alpha, paper_rows=True, round_before_fold=True), "w8a8_dyn",
            marks=pytest.mark.slow,
        ),  # fmt: skip
        pytest.param(
            lambda plan, alpha: CrossQuant(plan, alpha=alpha, round_before_fold=True), "w4a8_g16_int",
            marks=pytest.mark.slow,
        ),  # fmt: skip
        (AWQ, "w4a16_g16"),
        pytest.param(AWQ, "nf4_g16", marks=pytest.mark.slow),
    ],
)
def test_what_is_found_is_the_best_of_all_candidates_when_they_are_really_run(method, scheme):
    candidates = [i / 20 for i in range(20)] if method is AWQ else ALPHAS
    error, note = deployed_error(lambda plan: method(plan, alpha=None), scheme)
    errors = {a: deployed_error(lambda plan, a=a: method(plan, alpha=a), scheme)[0] for a in candidates}
    assert error == pytest.approx(errors[note.data["alpha"]], rel=1e-4)
    assert error <= 1.005 * min(errors.values()) < 0.95 * max(errors.values())
    nothing = (lambda plan: AWQ(plan, alpha=0.0)) if method is AWQ else (lambda plan: CrossQuant(plan, alpha=1.0))
    plain = deployed_error(nothing, scheme)[0]
    assert note.data["error relative to no factor"] == pytest.approx(error / plain, rel=0.01)
