"""Shares of activations that rounding makes zero, counted against a loop over the definition."""

import pytest
import torch

from qexport.quant.formats import ActivationFormat
from qexport.quant.observers import PercentileObserver
from qexport.quant.zero_fraction import RangeAndKernel, TokenKernel


def activations(seed=0, tokens=40, features=64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x[:, 3] *= 60
    return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.1, 0)


def by_definition(x, steps):
    small = zero = 0
    for row, row_steps in zip(x.double(), torch.as_tensor(steps).reshape(len(x), -1).expand(x.shape), strict=True):
        for value, step in zip(row, row_steps, strict=True):
            small += bool(abs(value) < step / 2 or value == 0)
            zero += bool(value == 0)
    return small / x.numel(), (small - zero) / (x.numel() - zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("alpha", [1.0, 0.15])
def test_dynamic(bits, alpha):
    x, fmt = activations(), ActivationFormat("dynamic", bits)
    factors = None if alpha == 1 else torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    kernel = TokenKernel(fmt, factors, alpha)
    for piece in x.split(7):
        kernel.update(piece)
    whole = x if factors is None else x * factors
    steps = torch.maximum(whole.double().abs().amax(1).pow(alpha), x.double().abs().amax(1)) / fmt.qmax
    want = by_definition(x, steps)
    assert tuple(kernel.kernel().values()) == pytest.approx(want, abs=2e-6)


def test_as_published():
    x, fmt = activations(), ActivationFormat("dynamic")
    kernel = TokenKernel(fmt, alpha=0.15, crossed=True)
    kernel.update(x)
    size = x.double().abs()
    steps = size.amax(1, keepdim=True) ** 0.15 * size.amax(0) ** 0.85 / 127
    assert tuple(kernel.kernel().values()) == pytest.approx(by_definition(x, steps), abs=2e-6)


def test_static():
    x, fmt = activations(), ActivationFormat("static", 8)
    for observer, absmax in ((None, float(x.abs().max())), (PercentileObserver(99), None)):
        seen = RangeAndKernel(observer)
        for piece in x.split(7):
            seen.update(piece)
        assert absmax is None or seen.absmax() == absmax
        scale = seen.absmax() / fmt.qmax
        want = by_definition(x, [scale] * len(x))
        assert tuple(seen.kernel(scale).values()) == pytest.approx(want, abs=2e-3)


def test_only_zeros_are_a_kernel_but_no_share_of_the_rest():
    kernel = TokenKernel(ActivationFormat("dynamic"))
    kernel.update(torch.zeros(3, 8))
    assert kernel.kernel() == {"kernel": 1.0, "kernel_without_zeros": 0.0}
