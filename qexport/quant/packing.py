"""Codes of few bits in bytes, the way ONNX tensors and ONNX Runtime's kernels keep them."""

import math

import torch
from torch import Tensor

# The longest blocks that MatMulNBits and MatMulBnb4 take on the CPU; with longer ones than 128, or with 16, the former
# unpacks 2-bit codes anew at every call.
_LONGEST_BLOCK, _LONGEST_BLOCK_2_BITS = 256, 128
_SHORTEST_BLOCK = 16
# Blocks that ONNX Runtime splits weights with one scale per channel into when it makes MatMulNBits of them
# (session.qdq_matmulnbits_block_size, its default).
DEFAULT_BLOCK = 32


def stored_block(bits: int, group_size: int) -> int:
    """Input features to a scale in the file: group_size, or the longest block of the kernel that divides it.

    A longer group has its scale and zero point in the file once for each block.

    Args:
        bits: of a code in the file; group_size: a power of two, at least 16.
    """
    return min(group_size, _LONGEST_BLOCK_2_BITS if bits == 2 else _LONGEST_BLOCK)


def whole_block(bits: int, group_size: int, features: int) -> int:
    """The longest block, `stored_block` at most, that leaves no shorter one at the end, which some readers refuse.

    Where none of 16 or more does, it is `stored_block` all the same.
    """
    longest = stored_block(bits, group_size)
    whole = math.gcd(longest, features)
    return whole if whole >= _SHORTEST_BLOCK else longest


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte as ONNX stores int4 and uint4 tensors: low nibble first, over row-major data.

    int8 codes are in [-8, 7], uint8 codes in [0, 15]; an odd count leaves a zero in the last high nibble.

    Args:
        codes: int8 or uint8, any shape; higher bits of a code are dropped.
    Returns:
        uint8 [ceil(count / 2)].
    """
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    if flat.storage_offset() % 2:
        flat = flat.clone()
    # Two codes read as one 16-bit word (little-endian, as every machine that PyTorch runs on): whole words are several
    # times faster than every second byte.
    words = flat.view(torch.int16)
    return ((words & 0x0F) | ((words >> 4) & 0xF0)).to(torch.uint8)


def unpack_int4(packed: Tensor, shape: tuple[int, ...], signed: bool) -> Tensor:
    """The codes that `pack_int4` packed: int8 in [-8, 7] when signed, uint8 in [0, 15] otherwise.

    Args:
        packed: uint8 [ceil(count / 2)].
        shape: what the codes were shaped like; its product is the count.
    """
    count = int(torch.Size(shape).numel())
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1)[:count].view(shape)
    # Flipping the sign bit and subtracting its value extends the sign without a branch.
    return codes.bitwise_xor(8).view(torch.int8).sub_(8) if signed else codes


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row by itself, the first code in the lowest bits, as MatMulNBits has its weight and zero points.

    Args:
        codes: uint8 [..., n] in [0, 2^bits - 1].
        bits: 2, 4 or 8.
    Returns:
        uint8 [..., ceil(n * bits / 8)]; zeros fill up the last byte of a row.
    """
    if bits == 8:
        return codes.contiguous()
    if bits == 4 and codes.shape[-1] % 2 == 0:
        return pack_int4(codes).view(*codes.shape[:-1], -1)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    parts = padded.view(*codes.shape[:-1], -1, per_byte).unbind(-1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (bits * place)
    return packed


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack_rows` packed.

    Args:
        packed: uint8 [..., bytes].
        bits: 2, 4 or 8.
        count: of the codes of a row.
    Returns:
        uint8 [..., count].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[..., :count]


def pack_high_first(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte over row-major data, the first in the high nibble, as MatMulBnb4 has them.

    Args:
        codes: uint8 in [0, 15], an even number of them.
    Returns:
        uint8 [count / 2].
    """
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack_high_first(packed: Tensor, count: int) -> Tensor:
    """The codes that `pack_high_first` packed.

    Args:
        packed: uint8, any shape.
    Returns:
        uint8 [count].
    """
    return torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[:count]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The codes in 32-bit words along the last axis, the first in the lowest bits; codes may lie across two words.

    Args:
        words: int32 [..., n], as many as hold whole codes: a multiple of 3 for 3 bits.
        bits: 1 to 8.
    Returns:
        uint8 [..., n * 32 / bits].
    """
    shared = math.gcd(32, bits)
    period, stride, mask = 32 // shared, bits // shared, (1 << bits) - 1
    parts = []
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        inside = min(bits, 32 - shift)  # of the code in its first word; shifts keep the sign, so the rest is masked
        part = (words[..., word::stride] >> shift) & ((1 << inside) - 1)
        if inside < bits:
            part |= (words[..., word + 1 :: stride] << inside) & mask
        parts.append(part.to(torch.uint8))
    return torch.stack(parts, dim=-1).flatten(-2)
