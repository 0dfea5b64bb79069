"""A causal convolution of every channel over a text, with the inputs that it read before as a state."""

import torch
from torch import Tensor

from .derivatives import differentiate


@torch.library.custom_op("qexport::causal_convolution", mutates_args=())
def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor) -> tuple[Tensor, Tensor]:
    """Each output reads its own input and the K - 1 in front of it.

    Args:
        x: [batch, channels, tokens].
        weight: [channels, 1, K]; bias: [channels].
        past: [batch, channels, K - 1], the inputs in front; zeros in front of a text.

    Returns:
        outputs [batch, channels, tokens]; the last K - 1 inputs, [batch, channels, K - 1].
    """
    return _convolve(x, weight, bias, past)


def _convolve(x, weight, bias, past) -> tuple[Tensor, Tensor]:
    whole = torch.cat([past, x], dim=2)
    out = torch.nn.functional.conv1d(whole, weight.to(x.dtype), bias, groups=weight.shape[0])
    return out, whole[:, :, whole.shape[2] - past.shape[2] :].clone()


@causal_convolution.register_fake
def _(x, weight, bias, past):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(causal_convolution, _convolve)
