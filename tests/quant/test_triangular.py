"""Triangular inverses in place against float64."""

import pytest
import torch

from qexport.quant.triangular import invert_lower_


@pytest.mark.parametrize("size", [1, 7, 128, 129, 257, 600, 1100])
def test_the_inverse_is_that_of_float64(size):
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator).tril() / size**0.5
    lower.diagonal().abs_().add_(1)
    found, kept = lower.clone(), lower.clone()
    invert_lower_(found)
    assert torch.equal(found, found.tril())
    product = found.double() @ kept.double()
    assert float((product - torch.eye(size)).abs().max()) < 1e-5
