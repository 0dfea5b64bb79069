"""Quantize and dequantize as graph nodes, with the meaning the ONNX operators have."""

import torch
from torch import Tensor

from ...quant.affine import blockwise_fake_quantize
from ...quant.expand import channel_scale, expand_to_int8
from ...quant.small_floats import e4m3_codes, e4m3_values

_RANGE = {True: (-128, 127), False: (0, 255)}


@torch.library.custom_op("qexport::dequantize_linear", mutates_args=())
def dequantize_linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int, bits: int
) -> Tensor:
    """(codes - zero_point) * scale.

    Args:
        codes: int8 or uint8 (4-bit codes take one byte each here and half a byte in the file).
        scale: floating point; a scalar, a vector along `axis`, or codes' shape with `axis` divided by block_size.
        zero_point: same shape as scale and dtype as codes; None is 0.
        axis, block_size: as in ONNX DequantizeLinear; block_size 0 is per-tensor or per-axis.
        bits: 2, 4 or 8.

    Returns:
        A tensor of codes' shape and scale's dtype.
    """
    centred = codes.to(scale.dtype)
    if zero_point is not None:
        centred = centred - _spread(zero_point, codes, axis, block_size).to(scale.dtype)
    return centred * _spread(scale, codes, axis, block_size)


@dequantize_linear.register_fake
def _(codes, scale, zero_point, axis, block_size, bits):
    return codes.new_empty(codes.shape, dtype=scale.dtype)


@torch.library.custom_op("qexport::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: int, signed: bool) -> Tensor:
    """Round x / scale to 8-bit codes around zero_point, half to even, saturating.

    Args:
        x: floating point.
        scale: scalar tensor.
        zero_point: 0 for signed codes; 128 makes unsigned codes of a symmetric grid.
        signed: int8 codes, otherwise uint8.
    """
    low, high = _RANGE[signed]
    codes = torch.round(x / scale) + zero_point
    return codes.clamp_(low, high).to(torch.int8 if signed else torch.uint8)


@quantize_linear.register_fake
def _(x, scale, zero_point, signed):
    return x.new_empty(x.shape, dtype=torch.int8 if signed else torch.uint8)


@torch.library.custom_op("qexport::token_scale", mutates_args=())
def token_scale(x: Tensor, qmax: int, power: float = 1.0) -> Tensor:
    """One scale per token: (max |x| over the last axis)^power / qmax, at least 1e-8 (1e-6 in float16, without 1e-8).

    Args:
        x: [..., features].
        qmax: largest code.
        power: 1; CrossQuant's row scale (arXiv 2410.07505) has its alpha here.

    Returns:
        [..., 1] of x's dtype.
    """
    floor = 1e-6 if x.dtype == torch.float16 else 1e-8
    absmax = x.abs().amax(dim=-1, keepdim=True)
    return ((absmax if power == 1 else absmax**power) * (1.0 / qmax)).clamp_min(floor)


@token_scale.register_fake
def _(x, qmax, power=1.0):
    return x.new_empty((*x.shape[:-1], 1))


@torch.library.custom_op("qexport::matmul_nbits_input", mutates_args=())
def matmul_nbits_input(x: Tensor, block_size: int) -> Tensor:
    """What ONNX Runtime's MatMulNBits kernel makes of its float input at accuracy level 4.

    The kernel rounds each row to 8 bits in blocks along the features. The ONNX file has no node for it: this op only
    makes the graph that PyTorch executes say what the file computes.

    Args:
        x: [..., features]; block_size: features that share a scale.
    """
    return blockwise_fake_quantize(x, block_size)


@matmul_nbits_input.register_fake
def _(x, block_size):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("qexport::matmul_integer", mutates_args=())
def matmul_integer(a: Tensor, b: Tensor) -> Tensor:
    """int8 [..., K] times int8 [K, N] in int32, exactly."""
    # float64 holds every int32 sum of 8-bit products exactly and is the fastest exact path PyTorch has on every CPU.
    return (a.double() @ b.double()).to(torch.int32)


@matmul_integer.register_fake
def _(a, b):
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=torch.int32)


@torch.library.custom_op("qexport::widen_int4", mutates_args=())
def widen_int4(codes: Tensor) -> Tensor:
    """4-bit codes as 8-bit ones of the same value: 4 bits in the file, 8 in the kernel."""
    return codes.clone()


@widen_int4.register_fake
def _(codes):
    return torch.empty_like(codes)


@torch.library.custom_op("qexport::expand_codes", mutates_args=())
def expand_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, factor: Tensor | None, row_scale: Tensor,
    group_size: int, bits: int,
) -> Tensor:  # fmt: skip
    """Codes in groups as int8 codes with one scale per output channel: few bits in the file, 8 in the kernel.

    Args: as `numerics.expand.expand`; bits: of a code in the file.
    """
    return expand_to_int8(codes, scale.float(), zero_point, factor, row_scale, group_size)


@expand_codes.register_fake
def _(codes, scale, zero_point, factor, row_scale, group_size, bits):
    return codes.new_empty(codes.shape, dtype=torch.int8)


@torch.library.custom_op("qexport::channel_scale", mutates_args=())
def channel_scale_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """The row_scale with which `expand_codes` covers a weight in groups. The file holds both results, not the codes.

    Args: as `numerics.expand.channel_scale`.

    Returns:
        float32 [N].
    """
    return channel_scale(codes, scale.float(), zero_point, group_size)


@channel_scale_of.register_fake
def _(codes, scale, zero_point, group_size):
    return codes.new_empty(codes.shape[1:], dtype=torch.float32)


@torch.library.custom_op("qexport::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, block_size: int
) -> Tensor:
    """x times a weight in groups of input features, as one kernel.

    Args:
        x: [..., K].
        codes: [K, N], scale and zero_point: [K / group_size, N], bits: as in `dequantize_linear`.
        group_size: rows of codes that share a scale.
        block_size: the same in the kernel: group_size, or a part of it where the kernel takes no longer ones. The file
            then has each scale several times.

    Returns:
        [..., N].
    """
    return x @ dequantize_linear(codes, scale, zero_point, 0, group_size, bits)


@matmul_nbits.register_fake
def _(x, codes, scale, zero_point, bits, group_size, block_size):
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def _spread(parameter: Tensor, codes: Tensor, axis: int, block_size: int) -> Tensor:
    """Expand a scale or zero point to something that broadcasts against codes."""
    if parameter.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    if block_size > 0:
        return parameter.repeat_interleave(block_size, dim=axis).narrow(axis, 0, codes.shape[axis])
    shape = [1] * codes.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


@torch.library.custom_op("qexport::round_e4m3", mutates_args=())
def round_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to E4M3 numbers times a scale, saturating.

    Args:
        scale: floating point, positive; of a shape that x's takes in.
    """
    return (e4m3_values(e4m3_codes(x.float() / scale.float())) * scale.float()).to(x.dtype)


@round_e4m3.register_fake
def _(x, scale):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
