"""Rounding for training is the rounding that is deployed, to the bit; and training lowers the error it is said to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qexport.graph.ops  # noqa: F401  registers the operators
from qexport.errors import NumericsError
from qexport.quant.formats import PER_CHANNEL, PER_TENSOR, ActivationFormat, IntegerFormat
from qexport.quant.gptq import gptq_quantize
from qexport.quant.straight_through import fake_quantize_tokens, fake_quantize_weight, round_weight, train_weight

ops = torch.ops.qexport
RATES = (0.01, 0.03, 0.1)
FORMATS = [
    IntegerFormat(bits, size, symmetric)
    for bits in (2, 3, 4, 8)
    for size in (16, PER_CHANNEL, PER_TENSOR)
    for symmetric in (True, False)
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(k, seed=0):
    """The Hessian of features that share a few directions and differ in size."""
    x = normal(400, k, seed=seed) @ (normal(k, k, seed=seed + 1) * torch.logspace(0, -1.5, k)[:, None])
    return (2 / 400) * x.t() @ x


def rows_error(w, trained, hessian, fmt):
    """Of the weight that plain rounding makes of `trained`, by row, in float64."""
    off = (fmt.round_to_nearest(trained).dequantize() - w).double()
    return ((off @ hessian.double()) * off).sum(1)


# ---- weights ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32), st.integers(-30, 30))
def test_rounded_weights_are_those_of_plain_rounding_to_the_bit(fmt, seed, exponent):
    w = normal(5, 48, seed=seed) * 2.0**exponent
    w[1] = 0  # a scale of 1
    w[2] = w[2].abs()  # a zero point at the end of the range
    w[3, :16] = torch.arange(16) * 0.5  # ties
    expected = fmt.round_to_nearest(w).dequantize()
    assert torch.equal(round_weight(w, fmt), expected)
    assert torch.equal(fake_quantize_weight(w.requires_grad_(), fmt), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_gradient_of_a_rounded_weight_goes_straight_through(fmt):
    w, weights = normal(4, 32).requires_grad_(), normal(4, 32, seed=1)
    (fake_quantize_weight(w, fmt) * weights).sum().backward()
    assert torch.equal(w.grad, weights)


def test_weights_that_are_no_numbers_are_refused():
    w = normal(4, 32)
    w[1, 3] = torch.nan
    with pytest.raises(NumericsError):
        fake_quantize_weight(w, IntegerFormat(4, 16))
    with pytest.raises(NumericsError):
        train_weight(w, torch.eye(32), IntegerFormat(4, 16), RATES, 5)


# ---- activations -----------------------------------------------------------------------------------------------------


def deployed(x, step):
    """What QuantizeActivations puts into a graph for a dynamic input."""
    one = torch.ones(())
    return ops.dequantize_linear(ops.quantize_linear(x / step, one, 0, True), one, None, 0, 0, 8) * step


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 4]), st.integers(-20, 20))
def test_rounded_tokens_are_those_of_the_graph_to_the_bit(seed, bits, exponent):
    fmt = ActivationFormat("dynamic", bits)
    x = normal(2, 7, 24, seed=seed) * 2.0**exponent
    x[0, 1] = 0
    assert torch.equal(fake_quantize_tokens(x, fmt), deployed(x, ops.token_scale(x, fmt.qmax)))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_tokens_with_the_papers_row_scale_are_those_of_the_graph(bits):
    fmt, factors = ActivationFormat("dynamic", bits), normal(24, seed=1).abs() + 0.1
    x = (normal(2, 7, 24) * torch.tensor([3, 0.05])[:, None, None]).requires_grad_()
    paper = ops.token_scale(x.detach() * factors, fmt.qmax, 0.3)
    step = torch.maximum(paper, ops.token_scale(x.detach(), fmt.qmax))
    assert 0 < (step > paper).float().mean() < 1  # tokens that are widened, and tokens that are not
    got = fake_quantize_tokens(x, fmt, factors, 0.3)
    assert torch.equal(got, deployed(x.detach(), step))
    got.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_gradient_of_rounded_tokens_goes_straight_through():
    x, weights = normal(3, 5, 8).requires_grad_(), normal(3, 5, 8, seed=1)
    (fake_quantize_tokens(x, ActivationFormat("dynamic", 4)) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


# ---- training a weight -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits < 8], ids=str)
def test_no_row_is_worse_than_rounded_and_together_they_are_much_better(fmt):
    w, hessian = normal(70, 64), correlated(64)  # more rows than learning rates are compared on
    found = train_weight(w, hessian, fmt, RATES, 40)
    before, after = rows_error(w, w, hessian, fmt), rows_error(w, found.weight, hessian, fmt)
    if fmt.group_size != PER_TENSOR:  # there rows share a scale and only the whole is kept from being worse
        assert (after <= before * (1 + 1e-4)).all()
    assert found.error == pytest.approx(float(after.sum() / before.sum()), rel=1e-3)
    assert found.error < 0.6 and found.learning_rate in RATES and 0 < found.steps <= 40


def test_it_removes_nearly_as_much_of_the_error_as_gptq():
    fmt, w, hessian = IntegerFormat(4, 16), normal(64, 64), correlated(64)
    off = (gptq_quantize(w, hessian, fmt).dequantize() - w).double()
    compensated = float(((off @ hessian.double()) * off).sum())
    rounded = float(rows_error(w, w, hessian, fmt).sum())
    trained = float(rows_error(w, train_weight(w, hessian, fmt, RATES, 100).weight, hessian, fmt).sum())
    assert rounded - trained > 0.85 * (rounded - compensated)


def test_where_rounding_is_best_the_weight_stays():
    w, fmt = normal(40, 32), IntegerFormat(4, 16)
    for rows in (w, w[:8]):
        found = train_weight(rows, torch.diag(torch.linspace(1, 5, 32)), fmt, (0.001,), 3)
        assert found.learning_rate is None and found.error == 1 and torch.equal(found.weight, rows)


def test_the_size_of_the_hessian_does_not_matter_and_runs_agree():
    w, hessian, fmt = normal(40, 32), correlated(32), IntegerFormat(3, 16, False)
    first, again, small = (train_weight(w, h, fmt, RATES, 20) for h in (hessian, hessian, hessian * 2.0**-40))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.weight, small.weight)
    assert first.error < 1


def test_a_feature_that_is_never_active_keeps_its_weights():
    w, hessian, fmt = normal(8, 32), correlated(32), IntegerFormat(4, 16)
    hessian[5] = hessian[:, 5] = 0
    found = train_weight(w, hessian, fmt, RATES, 20)
    assert found.error < 1 and torch.equal(found.weight[:, 5], w[:, 5])


def test_the_objective_has_the_gradient_that_training_uses():
    w, hessian, fmt = normal(6, 32), correlated(32), IntegerFormat(4, 16)
    latent = (w + 0.01 * normal(6, 32, seed=3)).requires_grad_()
    off = fake_quantize_weight(latent, fmt) - w
    ((off @ hessian) * off).sum().backward()
    assert torch.allclose(latent.grad, 2 * (round_weight(latent.detach(), fmt) - w) @ hessian, rtol=1e-4, atol=1e-4)
