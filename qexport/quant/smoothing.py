"""Factors that move the range of activations into the weights, channel by channel, and keep the product."""

import torch
from torch import Tensor

from ..errors import NumericsError, RecipeError

_FLOOR = 1e-5


def smoothquant_factors(activation_absmax: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): x is to be divided by s and the columns of every w multiplied.

    Both ranges and s itself are floored at 1e-5. A feature that no weight reads keeps s = 1; for one that is never
    active see `filled`.

    Args:
        activation_absmax: [K], the largest magnitude of every feature.
        weights: [N_i, K] of every linear that reads these features.
        alpha: 0 (all in the activations) to 1 (all in the weights).
    Returns:
        float32 [K], positive.
    Raises:
        NumericsError: NaN or Inf in a range.
        RecipeError: alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"SmoothQuant with alpha {alpha} is out of range", remedy="Use a number from 0 to 1")
    activation = activation_absmax.double()
    weight = torch.stack([torch.maximum(w.amax(0), -w.amin(0)).double() for w in weights]).amax(0)
    if not bool(torch.isfinite(activation + weight).all()):
        raise NumericsError("an activation or a weight has NaN or Inf", remedy="Check the checkpoint and the data")
    factors = filled(activation).clamp_min(_FLOOR).pow(alpha) / weight.clamp_min(_FLOOR).pow(1 - alpha)
    idle = (activation == 0).all() | (weight == 0)
    return factors.clamp_min_(_FLOOR).masked_fill_(idle, 1).float()


def crossquant_factors(activation_absmax: Tensor, alpha: float) -> Tensor:
    """s_j = c_j^(1 - alpha), the channel part of CrossQuant's step (arXiv 2410.07505); floored like SmoothQuant's.

    Args:
        activation_absmax: c, [K], the largest magnitude of every feature.
        alpha: 1 (per token only) to 0 (per channel only).
    Returns:
        float32 [K], positive; for a feature that is never active see `filled`.
    Raises:
        NumericsError: NaN or Inf in a range.
        RecipeError: alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"CrossQuant with alpha {alpha} is out of range", remedy="Use a number from 0 to 1")
    activation = activation_absmax.double()
    if not bool(torch.isfinite(activation).all()):
        raise NumericsError("an activation has NaN or Inf", remedy="Check the checkpoint and the data")
    factors = filled(activation).pow(1 - alpha).clamp_min_(_FLOOR)
    return factors.masked_fill_((activation == 0).all(), 1).float()


def lae_factors(activation_absmax: Tensor) -> Tensor:
    """s_j = r_j / log2(2 + r_j), r_j = max|x_j|: logarithmic activation equalization (FPTQ, arXiv 2308.15987).

    Dividing by s compresses every range r into log2(2 + r), which is 1 for the smallest: features with small ranges are
    enlarged as much as those with large ones are reduced. s goes to 0 with r and is floored at 1e-5.

    Args:
        activation_absmax: r, [K], the largest magnitude of every feature.
    Returns:
        float32 [K], positive; for a feature that is never active see `filled`.
    Raises:
        NumericsError: NaN or Inf in a range.
    """
    activation = activation_absmax.double()
    if not bool(torch.isfinite(activation).all()):
        raise NumericsError("an activation has NaN or Inf", remedy="Check the checkpoint and the data")
    reach = filled(activation)
    factors = reach / torch.log2(2 + reach)
    return factors.clamp_min_(_FLOOR).masked_fill_((activation == 0).all(), 1).float()


def filled(sizes: Tensor) -> Tensor:
    """The sizes of features with the median of the others in the place of zeros, as new data may wake these.

    A factor of 1 beside others of a hundredth would let the weights of a feature that was never active set the scale of
    a whole row, and beside others of a hundred the feature would be clipped as soon as it is active.

    Args:
        sizes: non-negative [K], such as the largest magnitude of every feature; returned as they are if all are zero.
    """
    idle = sizes == 0
    return sizes if bool(idle.all()) else sizes.masked_fill(idle, float(sizes[~idle].median()))
