"""Codes of 3, 5 and 6 bits without a bit to spare: planes of 4, 2 and 1 bits, which become those of kernels.

ONNX Runtime's kernels read codes of 2, 4 and 8 bits. A code of 5 bits is its upper 4 and its lowest one; each plane is
packed as such codes are. The bytes that a kernel reads are the planes' entries of one table each, by the byte of the
plane, joined by OR: no two planes touch the same bits.
"""

import torch
from torch import Tensor

from .packing import pack_rows

_BYTES = torch.arange(256, dtype=torch.int32)


def plane_bits(bits: int) -> tuple[int, ...]:
    """The bits of each plane of a code, the one with the highest bits first; one for what kernels read themselves."""
    return tuple(part for part in (8, 4, 2, 1) if bits & part)


def unsigned(codes: Tensor, bits: int, odd: bool = False) -> Tensor:
    """Codes counted from 0, uint8: int8 ones begin at the least of their range.

    Args:
        odd: they are odd numbers, -2^bits + 1 to 2^bits - 1.
    """
    if codes.dtype == torch.uint8:
        return codes
    return ((codes + ((1 << bits) - 1)) >> 1 if odd else codes + (1 << bits - 1)).view(torch.uint8)


def split(codes: Tensor, bits: int) -> list[Tensor]:
    """The planes of codes, packed row by row, the first code in the lowest bits.

    Args:
        codes: uint8 [..., n] in [0, 2^bits - 1], n a multiple of 8.

    Returns:
        uint8 [..., n * b / 8] for each b of `plane_bits`.
    """
    packed, left = [], bits
    for part in plane_bits(bits):
        left -= part
        packed.append(_packed(codes >> left & (1 << part) - 1, part))
    return packed


def tables(bits: int, wide: int, signed: bool, odd: bool = False) -> list[Tensor]:
    """What the byte of each plane means to a kernel: uint8 [256, wide / b], as many bytes of the kernel as it covers.

    Args:
        wide: bits of the kernel's codes.
        signed: codes are those of `unsigned`, and the kernel's begin at the least of `wide`; else both count from 0,
            as with zero points.
        odd: as `unsigned` takes it; then `wide` is more than `bits`.
    """
    found, left = [], bits
    least = -(1 << bits) + 1 if odd else -(1 << bits - 1)
    above = (1 << wide - 1) + least if signed else 0  # but for the lowest bit of odd codes, of the highest plane's unit
    for part in plane_bits(bits):
        left -= part
        fields = torch.stack([_BYTES >> part * place & (1 << part) - 1 for place in range(8 // part)], dim=-1)
        found.append(pack_rows(((fields << left + odd) + above).to(torch.uint8), wide))
        above = 0
    return found


def _packed(codes: Tensor, part: int) -> Tensor:
    if part > 1:
        return pack_rows(codes, part)
    units = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    packed: Tensor = (codes.unflatten(-1, (-1, 8)) * units).sum(-1, dtype=torch.uint8)
    return packed
