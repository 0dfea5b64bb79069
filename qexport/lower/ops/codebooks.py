"""Products with weights of a codebook."""

from functools import partial

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, is_call
from ...graph.meta import Meta
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...passes.formats.codebooks import ops
from ...quant.formats.codebooks import CODEBOOKS, LARGEST
from ...quant.packing import pack_high_first
from ..emitter import Emitter
from ..registry import translates
from .quantized import coarse_scales, kernel
from .quantized import ops as quant
from .small_floats import ZERO_OF_8_BITS


@translates(ops.matmul_bnb4.default)
def _matmul_bnb4(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (n, k), block_size = sizes_of(given.codes), given.block_size

    weight = emit.derived(given.codes, "packed", [n * k // 2], torch.uint8, pack_high_first)
    if Meta.COARSE in given.scale.meta:
        scales = coarse_scales(emit, given.scale, [n, k // block_size], partial(_spread, given))
        absmax = emit.op("Reshape", scales, emit.constant([-1]))
    else:
        flat = [n * k // block_size]
        absmax = emit.derived(given.scale, "blocks", flat, dtype_of(given.scale), lambda t: _spread(given, t).view(-1))
    return kernel(
        emit, node, "MatMulBnb4", given.x, weight, absmax, K=k, N=n, block_size=block_size,
        quant_type=CODEBOOKS[given.codebook].kernel_code,
    )  # fmt: skip


@translates(ops.matmul_codebook_as_integers.default)
def _as_integers(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """4 bits in the file; the table's values in 8 bits are looked up, two for a byte, when ONNX Runtime loads it."""
    (n, k), block_size = sizes_of(given.codes), given.block_size
    integers = CODEBOOKS[given.codebook].integers() + ZERO_OF_8_BITS
    pairs = torch.cartesian_prod(integers, integers).to(torch.uint8)  # by byte, the first code in the high bits
    packed = emit.derived(given.codes, "packed", [n, k // 2], torch.uint8, lambda t: pack_high_first(t).view(n, k // 2))
    shape = emit.constant([n, k // block_size, block_size])
    blocks, dtype = [n, k // block_size], dtype_of(given.scale)
    if Meta.COARSE in given.scale.meta:
        steps = coarse_scales(emit, given.scale, blocks, partial(_spread, given))
        scales = emit.op("Div", steps, emit.constant(float(LARGEST), dtype))
    else:
        scales = emit.derived(given.scale, "blocks", blocks, dtype, lambda t: _spread(given, t) / LARGEST)
    return kernel(
        emit, node, "MatMulNBits", given.x, emit.op("Reshape", emit.looked_up(packed, pairs), shape), scales,
        K=k, N=n, bits=8, block_size=block_size,
        accuracy_level=4 if is_call(given.x, quant.matmul_nbits_input.default) else 1,
    )  # fmt: skip


def _spread(given: Arguments, scale: torch.Tensor) -> torch.Tensor:
    """The scale of every block of the kernel."""
    return scale.repeat_interleave(given.group_size // given.block_size, dim=1)
