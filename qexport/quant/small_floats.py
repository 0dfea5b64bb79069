"""Floats of 4 and 8 bits as the OCP formats have them: E2M1, E4M3 (without infinities) and the powers of two of E8M0.

All of them round to nearest, ties to the even code, and saturate. Codes are bytes, one to a number; `packing` puts two
of 4 bits into one.
"""

import torch
from torch import Tensor

# Of code 0 to 7; code + 8 is the negative. There are neither infinities nor NaN.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9  # a subnormal number
E8M0_BIAS = 127
# Byte 255 is NaN; byte 0 is 2^-127, which is subnormal in float32 and may be flushed to zero there.
_E8M0_LOWEST, _E8M0_HIGHEST = 1, 254
_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # the middles; from an odd code to the next a tie goes up


def e2m1_codes(x: Tensor) -> Tensor:
    """Codes uint8 of x, finite float32 of any shape. What becomes zero is code 0, without a sign."""
    magnitude = x.abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for lower, middle in enumerate(_TIES):
        codes += magnitude >= middle if lower % 2 else magnitude > middle
    return torch.where((x < 0) & (codes > 0), codes + 8, codes)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 of codes 0 to 15."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.int()]


def e4m3_codes(x: Tensor) -> Tensor:
    """Codes uint8 of x, finite float32 of any shape; what is beyond 448 becomes 448."""
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_values(codes: Tensor) -> Tensor:
    """float32 of codes; 127 and 255 are NaN."""
    return codes.view(torch.float8_e4m3fn).float()


def e8m0_codes(exponents: Tensor) -> Tensor:
    """Codes uint8 of 2^exponents, within the normal numbers of float32."""
    return (exponents + E8M0_BIAS).clamp(_E8M0_LOWEST, _E8M0_HIGHEST).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """float32 of codes; 255 is NaN."""
    bits = codes.int() << 23  # a code is the exponent field of float32 itself
    bits = bits.masked_fill(codes == 0, 1 << 22).masked_fill(codes == 255, 0x7FC00000)
    return bits.view(torch.float32)
