"""Two 4-bit codes in a byte, the way ONNX stores int4 and uint4 tensors: low nibble first, over row-major data."""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] or uint8 codes in [0, 15]; an odd count leaves a zero in the last high nibble.

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
