"""CrossQuant against its formulas in float64, and what folding must not change."""

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of, plan_of, run_passes, stream_of
from helpers.runners import load_weights, padded, tokens
from qexport.calibrate.block_activations import Stream, collect
from qexport.errors import RecipeError
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Pipeline
from qexport.passes.equalization.crossquant import CrossQuant
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.quant.smoothing import crossquant_factors

WIDTH, OUT = 64, 48
FAMILIES = ["llama", "llama_bias", "opt", "gpt_neox", "gemma3"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT)

    def forward(self, x):
        return self.linear(self.norm(x))


def layer(outlier=30.0):
    """A block with an outlier channel, its inputs, and in float64 the linear's input, weight and bias."""
    module = Layer()
    block = block_of(module, WIDTH)
    with torch.no_grad():
        for name, tensor in block.named_buffers():
            if name == "norm.weight":
                tensor[5] *= outlier
                module.norm.weight[5] = tensor[5]
    x = torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    inputs = module.double().norm(x.double())
    return block, x, inputs.detach(), module.linear.weight.detach(), module.linear.bias.detach()


def quantized(block, x, scheme, cross, plan_scheme=None):
    plan = {"linear": LinearPlan("linear", "", (OUT, WIDTH), Scheme.parse(scheme))}
    passes = [cross(plan), RoundToNearest(plan), QuantizeActivations(plan, measure=True)]

    class Whole:
        inputs = ["x"]
        module = block

    stream = Stream([{"x": x}], [None], {"x": 0})
    results = Pipeline(passes).run(block, lambda module, wanted: collect(Whole, stream, module, wanted), (x,))
    return block(x)[0].double(), results


def rounded(w, qmax=127):
    step = w.abs().amax(1, keepdim=True) / qmax
    return torch.round(w / step) * step


def paper(inputs, alpha, qmax):
    t, c = inputs.abs().amax(-1, keepdim=True), inputs.abs().flatten(0, 1).amax(0)
    step = t**alpha * c ** (1 - alpha) / qmax
    return torch.round(inputs / step).clamp(-qmax, qmax) * step, (inputs.abs() < step / 2).double().mean()


def close(got, want, most):
    """Elements off by more than `most` of the largest are few: those whose code lies in the middle between two."""
    off = (got - want).abs() / want.abs().max()
    assert (off > most).double().mean() < 0.01 and off.max() < 0.02


@pytest.mark.parametrize("alpha", [0.15, 0.5, 1.0])
def test_the_papers_form_with_two_planes_is_the_papers_formula(alpha):
    block, x, inputs, w, b = layer()
    cross = lambda plan: CrossQuant(plan, alpha=alpha, paper_rows=True, round_before_fold=True)  # noqa: E731
    got, results = quantized(block, x, "w8a8_dyn", cross)
    want, kernel = paper(inputs, alpha, 127)
    close(got, want @ rounded(w).T + b, 3e-4)  # the second plane leaves a 254th of half a step
    note = results["QuantizeActivations"].changed[0]
    assert note.data["kernel"] == pytest.approx(float(kernel), abs=1e-3)


def test_as_published_it_is_the_formula_on_each_call():
    block, x, inputs, w, b = layer()
    plan = {"linear": LinearPlan("linear", "", (OUT, WIDTH), Scheme.parse("w8a8_dyn"))}
    Pipeline([RoundToNearest(plan), QuantizeActivations(plan, cross_alpha=0.15)]).run(block, lambda module, wanted: {})
    got = block(x[:1])[0].double()
    want, _ = paper(inputs[:1], 0.15, 127)
    close(got, want @ rounded(w).T + b, 1e-5)


def test_a_channel_beyond_its_calibrated_range_is_not_clipped():
    block, x, inputs, w, b = layer()
    cross = lambda plan: CrossQuant(plan, alpha=0.15, paper_rows=True, round_before_fold=True)  # noqa: E731
    quantized(block, x, "w8a8_dyn", cross)
    other = torch.zeros(1, 5, WIDTH)
    other[..., 9] = 50.0  # normalized, far beyond what this channel showed in calibration
    got = block(other)[0].double()
    reference = layer()[0](other)[0].double()
    # Clipped to what the channel showed, the output would be off by half; what is left is a large token's rounding.
    assert float((got - reference).abs().max()) < 0.15 * float(reference.abs().max())


def test_four_bit_activations_are_the_papers_formula_too():
    block, x, inputs, w, b = layer()
    cross = lambda plan: CrossQuant(plan, alpha=0.15, paper_rows=True, round_before_fold=True)  # noqa: E731
    got, _ = quantized(block, x, "w8a4", cross)
    want, _ = paper(inputs, 0.15, 7)
    off = (got - want @ rounded(w).T - b).abs() / want.abs().max()
    assert off.median() < 1e-3


@pytest.mark.parametrize("before", [False, True])
def test_the_folded_form_rounds_the_folded_token_by_its_own_maximum(before):
    alpha = 0.15
    block, x, inputs, w, b = layer()
    got, _ = quantized(block, x, "w8a8_dyn", lambda plan: CrossQuant(plan, alpha=alpha, round_before_fold=before))
    s = inputs.abs().flatten(0, 1).amax(0) ** (1 - alpha)
    folded = inputs / s
    step = folded.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(folded / step) * step
    close(got, codes @ (rounded(w) * s if before else rounded(w * s)).T + b, 3e-4 if before else 1e-5)


def test_its_kernel_and_error_are_smaller_than_those_of_one_scale_per_token():
    def run(cross, passes_scheme="w8a8_dyn"):
        block, x, inputs, w, b = layer()
        got, results = quantized(block, x, passes_scheme, cross)
        want = inputs @ w.T + b
        return float((got - want).square().mean()), results["QuantizeActivations"].changed[0].data["kernel"]

    plain_error, plain_kernel = run(lambda plan: CrossQuant(plan, alpha=1.0))  # alpha 1: every factor is 1
    error, kernel = run(lambda plan: CrossQuant(plan, alpha=0.15, round_before_fold=True))
    assert error < 0.3 * plain_error and kernel < 0.3 * plain_kernel


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_function(captured, family, explicit):
    model = load_weights(captured(family))
    plan, mask = plan_of(model, "w8a8_dyn"), padded([12, 7], "left")
    stream = stream_of(model, tokens(2, 12), mask)
    # keeps_function: the pipeline itself checks that outputs move by less than 1e-4
    results = run_passes(model, [CrossQuant(plan, explicit, alpha=0.15)], stream)
    changed = [note for result in results.values() for note in result.get("CrossQuant").changed]
    assert changed and all(note.data["alpha"] == 0.15 for note in changed)


def test_the_search_is_no_worse_than_any_alpha_it_tried():
    def error(alpha):
        block, x, inputs, w, b = layer()
        got, results = quantized(block, x, "w8a8_dyn", lambda plan: CrossQuant(plan, alpha=alpha))
        return float((got - (inputs @ w.T + b)).square().mean()), results["CrossQuant"].changed[0].data["alpha"]

    found, chosen = error(None)
    assert 0 <= chosen <= 1
    assert found <= min(error(alpha)[0] for alpha in (0.15, 0.5, 1.0)) * 1.02


def test_factors():
    absmax = torch.tensor([0.0, 1e-9, 1.0, 16.0])
    assert torch.allclose(crossquant_factors(absmax, 0.5), torch.tensor([1.0, 3.1623e-05, 1.0, 4.0]))
    assert torch.equal(crossquant_factors(absmax, 1.0), torch.ones(4))
    with pytest.raises(RecipeError, match="alpha 1.5"):
        crossquant_factors(absmax, 1.5)
