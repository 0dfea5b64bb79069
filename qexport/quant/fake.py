"""What quantization makes of float numbers, in float: the values a deployed model computes with."""

import torch
from torch import Tensor

from .affine import quantize_weight, static_scale
from .codebook import quantize_codebook
from .formats import ActivationFormat, Scheme, WeightFormat
from .zero_fraction import token_step

_SMALLEST_STEP = 1e-8  # of a token, so that one of zeros divides by something


def fake_weight(w: Tensor, fmt: WeightFormat) -> Tensor:
    """The weight after rounding to nearest, float32 [N, K]; raises what `quantize_weight` raises."""
    return (quantize_weight if fmt.codebook is None else quantize_codebook)(w, fmt).dequantize()


def fake_folded_weight(w: Tensor, factors: Tensor, scheme: Scheme, rounded_first: bool = False) -> Tensor:
    """The weight with a factor for each column, as a scheme stores and multiplies it.

    Args:
        w: float [N, K]; factors: [K].
        rounded_first: the factors come after the rounding, in a second plane of codes or in the expansion of groups to
            int8; a second plane's own rounding error is left out.
    Returns:
        float32 [N, K].
    """
    value = fake_weight(w, scheme.weight) * factors if rounded_first else fake_weight(w * factors, scheme.weight)
    return fake_weight(value, WeightFormat(8)) if scheme.expand else value


def fake_activation(
    x: Tensor, fmt: ActivationFormat | None, absmax: float | None = None, step: Tensor | None = None
) -> Tensor:
    """The activation after quantization.

    Args:
        x: float [tokens, K].
        fmt: None leaves it as it is.
        absmax: the range of a static format; None: that of x.
        step: of every token, [tokens, 1], for a dynamic format; None: its largest magnitude / qmax.
    """
    if fmt is None:
        return x
    if fmt.kind == "static":
        step = static_scale(float(x.abs().amax()) if absmax is None else absmax, fmt)
    else:
        step = (token_step(x, fmt) if step is None else step).clamp_min(_SMALLEST_STEP)
    return torch.div(x, step).round_().clamp_(-fmt.qmax, fmt.qmax).mul_(step)
