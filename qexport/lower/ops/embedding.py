"""Looking rows up in a quantized table."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...quant.packing import stored_block
from ..emitter import Emitter
from ..registry import translates
from .quantized import packed_codes, packed_scales

ops = torch.ops.qexport


@translates(ops.gather_quantized.default)
def _gather_quantized(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    k, n = sizes_of(given.codes)
    bits, block_size = given.bits, stored_block(given.bits, given.group_size)
    table = packed_codes(emit, given.codes, bits, "rows", [n, k * bits // 8])
    scales, zeros = packed_scales(
        emit, given.codes, given.scale, given.zero_point, bits, given.group_size, block_size
    )  # fmt: skip
    return emit.op(
        "GatherBlockQuantized", table, emit.get(given.ids), scales, zeros, domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
