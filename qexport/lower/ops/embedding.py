"""Looking rows up in a quantized table."""

import torch
from torch.fx import Node

from ...numerics.packing import stored_block
from ...passes.edit import shape_of
from ..emitter import Emitter
from .quantized import packed_codes, packed_scales

ops = torch.ops.qexport


def _gather_quantized(emit: Emitter, node: Node):
    codes, scale, zero_point, ids, group_size, bits = node.args
    k, n = shape_of(codes)
    block_size = stored_block(bits, group_size)
    table = packed_codes(emit, codes, bits, "rows", [n, k * bits // 8])
    scales, zeros = packed_scales(emit, codes, scale, zero_point, bits, group_size, block_size)
    return emit.op(
        "GatherBlockQuantized", table, emit.get(ids), scales, zeros, domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


TRANSLATIONS = {ops.gather_quantized.default: _gather_quantized}
