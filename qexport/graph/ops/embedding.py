"""Looking rows up in a quantized table."""

import torch
from torch import Tensor

from .quant import dequantize_linear


@torch.library.custom_op("qexport::gather_quantized", mutates_args=())
def gather_quantized(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, ids: Tensor, group_size: int, bits: int
) -> Tensor:
    """The rows of a table of V rows of K features in groups, dequantized one by one.

    The table lies as the weight of a linear does in `dequantize_linear` along axis 0, so that an output projection can
    read the same tensors.

    Args:
        codes: int8 or uint8 [K, V]; scale and zero_point: [K / group_size, V]; bits: as in `dequantize_linear`.
        ids: integer, any shape, in [0, V - 1].
        group_size: features that share a scale.

    Returns:
        [*ids.shape, K] of scale's dtype.
    """
    flat = ids.reshape(-1)
    codes, scale = codes.index_select(1, flat), scale.index_select(1, flat)
    zero_point = None if zero_point is None else zero_point.index_select(1, flat)
    rows = dequantize_linear(codes, scale, zero_point, 0, group_size, bits).t().contiguous()
    return rows.view(*ids.shape, codes.shape[0])


@gather_quantized.register_fake
def _(codes, scale, zero_point, ids, group_size, bits):
    return scale.new_empty((*ids.shape, codes.shape[0]))
