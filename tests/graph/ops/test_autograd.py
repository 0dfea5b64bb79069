"""Derivatives of the operators that training runs through, against finite differences and plain PyTorch."""

import pytest
import torch

import qexport.graph.ops  # noqa: F401  registers the operators

ops = torch.ops.qexport


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_inputs(past, padded=True):
    """query, key, value, past_key, past_value, mask: 4 heads over 2 kv heads, 3 new tokens."""
    real = torch.ones(2, past + 3, dtype=torch.int64)
    real[1, : 2 if padded else 0] = 0
    mask = ops.causal_mask(real, past, 0)
    shapes = [(2, 4, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), (2, 2, past, 4), (2, 2, past, 4)]
    return [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)] + [mask]


@pytest.mark.by_default("2-2.0")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("past", [0, 2])
def test_attention_has_the_derivative_of_finite_differences(past, softcap):
    inputs = attention_inputs(past)
    assert torch.autograd.gradcheck(lambda *a: ops.cached_attention(*a, inputs[5], 0.5, softcap), inputs[:5])


def test_rotary_embedding_has_the_derivative_of_finite_differences():
    x, cos, sin = draw(2, 3, 4, 6), draw(2, 4, 3, seed=1), draw(2, 4, 3, seed=2)
    for tensor in (x, cos, sin):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(ops.rotary_embedding, (x, cos, sin))


def test_only_the_output_of_attention_may_be_used():
    """As in a block without a cache behind it: nobody asks for the present keys and values."""
    query, key, value, past_key, past_value, mask = attention_inputs(2)
    key.requires_grad_(False)
    out, _, _ = ops.cached_attention(query, key, value, past_key, past_value, mask, 0.5, 0.0)
    out.sum().backward()
    assert key.grad is None and past_key.grad.abs().sum() > 0

    keys, values = torch.cat([past_key, key], 2).repeat_interleave(2, 1), torch.cat([past_value, value], 2)
    weights = torch.softmax(query @ keys.transpose(2, 3) * 0.5 + mask, -1)
    expected = torch.autograd.grad((weights @ values.repeat_interleave(2, 1)).sum(), [query, value])
    for got, want in zip((query.grad, value.grad), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def test_only_the_cache_may_be_used():
    query, key, *rest = attention_inputs(2)
    _, present_key, _ = ops.cached_attention(query, key, *rest, 0.5, 0.0)
    present_key.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key)) and query.grad is None


def test_masks_have_no_derivative():
    assert not attention_inputs(2)[5].requires_grad
