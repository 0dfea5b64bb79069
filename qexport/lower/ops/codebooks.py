"""Products with weights of a codebook."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...passes.formats.codebooks import ops
from ...quant.formats.codebooks import CODEBOOKS
from ...quant.packing import pack_high_first
from ..emitter import Emitter
from ..registry import translates
from .quantized import kernel


@translates(ops.matmul_bnb4.default)
def _matmul_bnb4(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (n, k), block_size = sizes_of(given.codes), given.block_size

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(given.group_size // block_size, dim=1).view(-1)

    weight = emit.derived(given.codes, "packed", [n * k // 2], torch.uint8, pack_high_first)
    absmax = emit.derived(given.scale, "blocks", [n * k // block_size], dtype_of(given.scale), spread)
    return kernel(
        emit, node, "MatMulBnb4", given.x, weight, absmax, K=k, N=n, block_size=block_size,
        quant_type=CODEBOOKS[given.codebook].kernel_code,
    )  # fmt: skip
