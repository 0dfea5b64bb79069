"""Derivatives of operators that compute what a plain function of PyTorch does."""

from collections.abc import Callable

import torch
from torch import Tensor


def differentiate(op, plain: Callable) -> None:
    """Give an op the derivative of the plain function that it computes, with respect to any of its tensors."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        ctx.set_materialize_grads(False)

    def backward(ctx, *gradients):
        inputs, grads = list(ctx.others), [None] * len(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[place])
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
        with torch.enable_grad():
            outputs = plain(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        reached = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None]
        # Not every output depends on every input: an attention output says nothing about who reads the cache.
        found = torch.autograd.grad(
            [out for out, _ in reached], [inputs[i] for i in wanted], [grad for _, grad in reached], allow_unused=True
        )
        for place, grad in zip(wanted, found, strict=True):
            grads[place] = grad
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)
