"""The upper bits of codes as codes of their own (Matryoshka quantization, arXiv 2502.06786).

A code q of c bits becomes clamp(round(q / 2^(c - r))) of r bits, and its scale 2^(c - r) as large. Rounded and not cut
off: cutting moves every weight down by half a step.
"""

from torch import Tensor


def slice_codes(codes: Tensor, zero: Tensor | None, bits: int, fewer: int) -> tuple[Tensor, Tensor | None]:
    """The upper bits of codes, around what stands for zero.

    Args:
        codes: uint8 in [0, 2^bits - 1], any shape.
        zero: uint8, a shape that broadcasts to that of codes; None is 2^(bits - 1).
        fewer: bits to leave.

    Returns:
        uint8 codes in [0, 2^fewer - 1], and zero points; None where there were none, which is 2^(fewer - 1).
    """
    step = 1 << (bits - fewer)
    most = (1 << fewer) - 1
    old = 1 << (bits - 1) if zero is None else zero.float()
    new = None if zero is None else (zero.float() / step).round().clamp(0, most)
    around = 1 << (fewer - 1) if new is None else new
    steps = ((codes.float() - old) / step).round_()
    sliced = (steps + around).clamp(0, most).to(codes.dtype)
    return sliced, None if new is None else new.to(codes.dtype)
