"""Which integer convolutions take longer than those of floats on the CPU: few inputs make long rows of short sums."""

import math
from collections.abc import Sequence

_EACH_ALONE = ((49, 128), (25, 64), (1, 32))


def slower_than_float(shape: Sequence[int], groups: int) -> str:
    """Why a convolution is faster in float; empty where it is not.

    Measured by samples/convolution_speed.py (one thread, AVX512-VNNI; samples/results/convolution_speed.md). A
    convolution is left in float where its own time is more than that of floats with codes made of them and floats of
    codes, which integers on both of its sides need. Groups of several channels were not measured and stay integer.

    Args:
        shape: of the weight, [outputs, inputs of a group, kernel ...].
    """
    outputs, inputs, *kernel = shape
    area = math.prod(kernel)
    where = f"of {inputs} channels with a kernel of {'x'.join(map(str, kernel))}"
    if groups > 1:
        least = next(channels for least_area, channels in _EACH_ALONE if area >= least_area)
        slow = inputs == 1 and outputs < least
        where = f"of {outputs} channels, each alone,"
    else:
        few = inputs < 8 and not (outputs >= 64 and area >= 25)
        slow = few or (inputs < 16 and area < 25) or (outputs < 8 and area == 1)
    return f"an integer convolution {where} is slower than float" if slow else ""
