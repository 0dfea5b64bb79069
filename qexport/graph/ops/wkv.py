"""RWKV's attention without queries (Peng et al., "RWKV", arXiv 2305.13048): a weighted mean of values for each channel.

Weights are exp(k_i + (t - 1 - i) d) of the tokens in front and exp(u + k_t) of the token itself, with a decay d and a
bonus u of the channel. Sums are kept as multiples of the exponential of their largest exponent, so none overflows.
"""

import torch
from torch import Tensor

from .derivatives import differentiate

FAR = -1e38  # the largest exponent of no token


@torch.library.custom_op("qexport::wkv", mutates_args=())
def wkv(decay: Tensor, first: Tensor, key: Tensor, value: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Means of all tokens, and the sums behind the last one.

    Args:
        decay: d, at most 0; first: u; [channels].
        key, value: [batch, tokens, channels].
        past: sums in front of weighted values and of weights, both without their scale, and its logarithm:
            [batch, 3, channels]; zeros in front of a text.

    Returns:
        [batch, tokens, channels]; [batch, 3, channels].
    """
    return _mean(decay, first, key, value, past)


def _mean(decay, first, key, value, past) -> tuple[Tensor, Tensor]:
    values, weights, most = past.float().unbind(1)
    most = torch.where(weights == 0, torch.full_like(most, FAR), most)
    made = []
    for k, v in zip(key.float().unbind(1), value.float().unbind(1), strict=True):
        own = k + first
        top = torch.maximum(most, own)
        old, new = (most - top).exp(), (own - top).exp()
        made.append((old * values + new * v) / (old * weights + new))
        most = most + decay
        top = torch.maximum(most, k)
        old, new, most = (most - top).exp(), (k - top).exp(), top
        values, weights = old * values + new * v, old * weights + new
    out = torch.stack(made, 1) if made else value.float() * 1.0
    return out.to(value.dtype), torch.stack([values, weights, most], 1).to(past.dtype)


@wkv.register_fake
def _(decay, first, key, value, past):
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(past)


differentiate(wkv, _mean)
