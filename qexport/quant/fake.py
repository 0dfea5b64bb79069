"""What quantization makes of float numbers, in float: the values a deployed model computes with."""

from torch import Tensor

from .affine import static_scale
from .formats import ActivationFormat, WeightFormat
from .zero_fraction import token_step

_SMALLEST_STEP = 1e-8  # of a token, so that one of zeros divides by something


def fake_folded_weight(w: Tensor, factors: Tensor, fmt: WeightFormat, rounded_first: bool = False) -> Tensor:
    """The weight with a factor for each column, as a format stores and multiplies it.

    Args:
        w: float [N, K]; factors: [K].
        rounded_first: the factors come after the rounding, in a second plane of codes or in the expansion of groups to
            int8; a second plane's own rounding error is left out.
    Returns:
        float32 [N, K].
    """
    return fmt.multiplied(fmt.rounded(w) * factors if rounded_first else fmt.rounded(w * factors))


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
        scale = static_scale(float(x.abs().amax()) if absmax is None else absmax, fmt)
        return fmt.round_steps(x / scale).mul_(scale)
    step = (token_step(x, fmt) if step is None else step).clamp_min(_SMALLEST_STEP)
    return fmt.round_steps(x / step).mul_(step)
