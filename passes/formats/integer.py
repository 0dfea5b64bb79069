"""Grids of integers in a graph: dequantize_linear, which ONNX has and ONNX Runtime's kernels are made of."""

from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ...graph.edit import add_tensor, call, shape_of
from ...graph.meta import Meta
from ...graph.views import DequantizeLinear, ExpandCodes, size_at
from ...quant.expand import expanded_scale
from ...quant.formats import PER_TENSOR, ExpandedFormat, IntegerCodes, QuantizedWeight, WeightFormat
from ...quant.formats.midrise import Midrise
from ...quant.formats.mixed_bits import MixedBits
from ...quant.packing import DEFAULT_BLOCK, stored_block, whole_block
from .base import GraphForm, graph_form, scale_tensor

ops = torch.ops.qexport
OPSET_OF_2_BITS = 25


def rounds_inputs(bits: int, block: int) -> bool:
    """Whether MatMulNBits rounds its input to 8 bits in blocks, at accuracy level 4 on the CPU.

    The 2-bit kernel for such inputs has no blocks of 16; without it the weight is unpacked, the product float.
    """
    return bits != 2 or block != 16


@graph_form(IntegerCodes)
class IntegerForm(GraphForm):
    """dequantize_linear(codes [K, N], scale, zero point)."""

    operator: ClassVar[Any] = ops.dequantize_linear.default
    kernel = "MatMulNBits"
    kernel_operator: ClassVar[Any] = ops.matmul_nbits.default

    def insert(
        self, module: GraphModule, name: str, weight: QuantizedWeight, factor: torch.Tensor | None = None
    ) -> Node:
        fmt = weight.format
        codes, scale, zero_point = weight_tensors(module, name, weight)
        axis, group_size = (0, fmt.group_size) if fmt.group_size > 0 else (1, 0)
        arguments = (codes, scale, zero_point, axis, group_size, fmt.stored_bits)
        return call(module.graph, self.operator, arguments, like=scale, shape=shape_of(codes))

    def scales_in_sum(self, weight: Node) -> bool:
        return DequantizeLinear.of(weight).block_size > 0

    def why_not_beside(self, weight: Node) -> str:
        found = DequantizeLinear.of(weight)
        if shape_of(found.scale) == ():
            return "its weight has one scale"
        expanded = ExpandCodes.match(found.codes)
        if expanded is not None and expanded.factor is not None:
            return "the columns of its weight carry factors"
        return ""

    def input_block(self, weight: Node, whole: bool = False) -> int | None:
        codes = DequantizeLinear.of(weight)
        group_size, bits = codes.block_size, codes.bits
        if group_size == 0:
            return DEFAULT_BLOCK
        block = whole_block(bits, group_size, size_at(weight, 0)) if whole else stored_block(bits, group_size)
        return block if rounds_inputs(bits, block) else None

    def slow_with_float_inputs(self, fmt: WeightFormat) -> str:
        return f"{fmt.stored_bits}-bit weights" if isinstance(fmt, IntegerCodes) and fmt.stored_bits != 4 else ""

    def why_not_standard(self, fmt: WeightFormat, opset: int) -> str:
        few = isinstance(fmt, IntegerCodes) and fmt.stored_bits == 2 and opset < OPSET_OF_2_BITS
        return f"2-bit codes, which ONNX has from opset {OPSET_OF_2_BITS} on" if few else ""

    def kernel_arguments(self, weight: Node) -> tuple[Any, ...] | None:
        """One scale per channel is left to ONNX Runtime: it repeats the scale for every block, the file need not."""
        found = DequantizeLinear.of(weight)
        group_size, bits = found.block_size, found.bits
        if group_size == 0:
            return None
        return found.codes, found.scale, found.zero_point, bits, group_size, stored_block(bits, group_size)


@graph_form(ExpandedFormat)
class ExpandedForm(IntegerForm):
    """The same of codes in groups that become int8 codes per channel, times the factor, when the file is loaded."""

    operator = kernel_operator = None

    def insert(
        self, module: GraphModule, name: str, weight: QuantizedWeight, factor: torch.Tensor | None = None
    ) -> Node:
        graph, fmt = module.graph, weight.format
        codes, scale, zero_point = weight_tensors(module, name, weight)
        factors = None if factor is None else add_tensor(graph, f"{name}.column_factor", factor.clone())
        row_scale = add_tensor(graph, f"{name}.row_scale", expanded_scale(weight, factor))
        arguments = (codes, scale, zero_point, factors, row_scale, fmt.group_size, fmt.stored_bits)
        wide = call(graph, ops.expand_codes.default, arguments, like=codes, dtype=torch.int8)
        dense = (wide, row_scale, None, 1, 0, 8)
        return call(graph, ops.dequantize_linear.default, dense, like=row_scale, shape=shape_of(codes))


def weight_tensors(module: GraphModule, name: str, weight: QuantizedWeight) -> tuple[Node, Node, Node | None]:
    """Codes, scales and zero points of an integer grid as `dequantize_linear` wants them: codes [K, N]."""
    graph, size = module.graph, weight.format.group_size

    def layout(t: torch.Tensor) -> torch.Tensor:  # [N, G] as the operator wants it
        if size == PER_TENSOR:
            return t.reshape(())
        return t.t().contiguous() if size > 0 else t.reshape(-1)

    codes = add_tensor(graph, f"{name}.weight_codes", weight.codes.t().contiguous())
    if weight.format.in_planes:
        fmt = weight.format
        codes.meta[Meta.PLANES] = fmt.group_bits if isinstance(fmt, MixedBits) else fmt.bits
        if isinstance(fmt, MixedBits | Midrise):
            codes.meta[Meta.ODD] = fmt.odd_up_to
    scale = scale_tensor(graph, name, layout(weight.scale), weight.format)
    zero_point = None
    if weight.zero_point is not None:
        zero_point = add_tensor(graph, f"{name}.weight_zero_point", layout(weight.zero_point))
    return codes, scale, zero_point
