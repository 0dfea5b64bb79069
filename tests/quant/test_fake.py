"""Fake quantization is what the operators of a quantized graph compute."""

import pytest
import torch

from qexport.quant.expand import expand_to_int8, expanded_scale
from qexport.quant.fake import fake_activation, fake_folded_weight
from qexport.quant.formats import ActivationFormat, Scheme

ops = torch.ops.qexport


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_on_an_integer_grid_and_in_a_codebook():
    w = normal(6, 128)
    for scheme in ("w4a16_g32", "w4a16_g32_asym", "w3a16_pc", "w4a16_pt"):
        fmt = Scheme.parse(scheme).weight
        assert torch.equal(fmt.rounded(w), fmt.round_to_nearest(w).dequantize())
    for scheme in ("nf4", "fp4_g32_dq"):
        fmt = Scheme.parse(scheme).weight
        q = fmt.round_to_nearest(w)
        want = ops.dequantize_codebook(q.codes, q.scale, fmt.name, fmt.group_size).t()
        assert torch.equal(fmt.rounded(w), want)


@pytest.mark.parametrize("rounded_first", [False, True])
def test_a_folded_weight_is_rounded_after_or_before(rounded_first):
    w, factors, scheme = normal(6, 128), 0.5 + normal(128, seed=1).abs(), Scheme.parse("w8a8_dyn")
    got = fake_folded_weight(w, factors, scheme.weight, rounded_first)
    step = w.abs().amax(1, keepdim=True) / 127 * factors if rounded_first else (w * factors).abs().amax(1, True) / 127
    # Before: a whole number of unscaled steps. After: of scaled ones.
    multiples = got / step
    assert torch.allclose(multiples, multiples.round(), atol=1e-4)
    assert ((got - w * factors).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("rounded_first", [False, True])
def test_groups_that_are_expanded_to_int8_are_rounded_twice(rounded_first):
    w, factors, scheme = normal(6, 128), 0.5 + normal(128, seed=1).abs(), Scheme.parse("w4a8_g32_int")
    q = scheme.weight.round_to_nearest(w if rounded_first else w * factors)
    late = factors if rounded_first else None
    row = expanded_scale(q, late)
    codes = expand_to_int8(q.codes.t(), q.scale.t(), None, late, row, 32)
    want = (codes.float() * row).t()
    got = fake_folded_weight(w, factors, scheme.weight, rounded_first)
    assert torch.allclose(got, want, atol=1e-6)
    assert (want - fake_folded_weight(w, factors, Scheme.parse("w4a8_g32").weight, rounded_first)).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_activations_are_those_of_the_operators(bits):
    x, fmt = normal(7, 32) * torch.logspace(-3, 3, 7)[:, None], ActivationFormat("dynamic", bits)
    x[2] = 0
    step = ops.token_scale(x, fmt.qmax)
    want = ops.quantize_linear(x / step, torch.ones(()), 0, True).float() * step
    assert torch.allclose(fake_activation(x, fmt), want, rtol=1e-6, atol=0)
    assert torch.equal(fake_activation(x, fmt)[2], torch.zeros(32))
    wide = fake_activation(x, fmt, step=2 * step)
    assert torch.allclose(wide, torch.round(x / (2 * step)) * 2 * step)


def test_static_activations_have_the_given_range_or_their_own():
    x = normal(5, 32)
    for bits, qmax in ((4, 7), (8, 127)):
        fmt = ActivationFormat("static", bits)
        own, given = x.abs().max() / qmax, 1.5 / qmax
        assert torch.allclose(fake_activation(x, fmt), torch.round(x / own) * own)
        clipped = torch.round(x / given).clamp(-qmax, qmax) * given
        assert torch.allclose(fake_activation(x, fmt, 1.5), clipped) and clipped.abs().max() < 1.51 < x.abs().max()


def test_float_stays():
    x = normal(3, 4)
    assert fake_activation(x, None) is x
