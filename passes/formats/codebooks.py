"""NF4 and FP4 in a graph: operators of their own, and ONNX Runtime's MatMulBnb4."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.edit import add_tensor, call, is_call
from ...graph.schema import bind
from ...quant.formats.base import QuantizedWeight, WeightFormat
from ...quant.formats.codebooks import CodebookFormat, decode_codebook
from ...quant.packing import stored_block
from .base import GraphForm, graph_form, scale_tensor

ops = torch.ops.qexport


@torch.library.custom_op("qexport::dequantize_codebook", mutates_args=())
def dequantize_codebook(codes: Tensor, scale: Tensor, codebook: str, block_size: int) -> Tensor:
    """The weight that table indices stand for, transposed: [in_features, out_features].

    Args:
        codes: uint8 [N, K], indices of the table of 16 values.
        scale: [N, K / block_size], the largest magnitude of each block.
        codebook: name of the table.
    """
    return decode_codebook(codes, scale, codebook, block_size).t().contiguous()


@dequantize_codebook.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, codebook: str, block_size: int) -> torch.Tensor:
    return scale.new_empty((codes.shape[1], codes.shape[0]))


@torch.library.custom_op("qexport::matmul_bnb4", mutates_args=())
def matmul_bnb4(x: Tensor, codes: Tensor, scale: Tensor, codebook: str, group_size: int, block_size: int) -> Tensor:
    """x times the weight of `dequantize_codebook`, as one kernel.

    Args:
        x: [..., K]; codes: [N, K]; scale: [N, K / group_size].
        block_size: of the kernel; as in `matmul_nbits`.

    Returns:
        [..., N].
    """
    return x @ decode_codebook(codes, scale, codebook, group_size).t()


@matmul_bnb4.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, codebook: str, group_size: int, block_size: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qexport::matmul_codebook_as_integers", mutates_args=())
def matmul_codebook_as_integers(
    x: Tensor, codes: Tensor, scale: Tensor, codebook: str, group_size: int, block_size: int
) -> Tensor:
    """The same with the values of the table rounded to 8 bits, in a product that reads groups of integers.

    Args:
        block_size: of that kernel.
    """
    return x @ decode_codebook(codes, scale, codebook, group_size, as_integers=True).t()


@matmul_codebook_as_integers.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, codebook: str, group_size: int, block_size: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@graph_form(CodebookFormat)
class CodebookForm(GraphForm):
    """dequantize_codebook(codes [N, K], scale [N, G]).

    A product is ONNX Runtime's kernel for tables where the target has it, else a MatMulNBits of 8 bits: what is a table
    in the file becomes integers when it is loaded.
    """

    operator = ops.dequantize_codebook.default
    kernel = "MatMulBnb4"
    kernel_operator = ops.matmul_bnb4.default
    other_kernel_operators = (ops.matmul_codebook_as_integers.default,)

    def insert(self, module: GraphModule, name: str, weight: QuantizedWeight, factor: Tensor | None = None) -> Node:
        if not isinstance(fmt := weight.format, CodebookFormat):
            raise TypeError(f"{fmt} is not a codebook")
        codes = add_tensor(module.graph, f"{name}.weight_codes", weight.codes)
        scale = scale_tensor(module.graph, name, weight.scale, fmt)
        rows, columns = weight.shape
        arguments = (codes, scale, fmt.name, fmt.group_size)
        return call(module.graph, self.operator, arguments, like=scale, shape=(columns, rows))

    def why_not_beside(self, weight: Node) -> str:
        return "its codes are indices of a table"

    def input_block(self, weight: Node, whole: bool = False) -> int:
        return stored_block(8, bind(weight).block_size)

    def own_product(self, x: Node, weight: Node, kernels: Collection[str]) -> tuple[Any, tuple[Any, ...]] | None:
        if self.kernel in kernels:
            return super().own_product(x, weight, kernels)
        given = bind(weight)
        arguments = given.codes, given.scale, given.codebook, given.block_size, stored_block(8, given.block_size)
        return self.other_kernel_operators[0], (x, *arguments)

    def kernel_at(self, product: Node) -> str:
        return self.kernel if is_call(product, self.kernel_operator) else "MatMulNBits"

    def slow_with_float_inputs(self, fmt: WeightFormat) -> str:
        return "tables of values"

    def why_not_standard(self, fmt: WeightFormat, opset: int) -> str:
        return "a table of values, and ONNX dequantizes integers and floating-point codes only"

    def kernel_arguments(self, weight: Node) -> tuple[Any, ...]:
        given = bind(weight)
        return given.codes, given.scale, given.codebook, given.block_size, stored_block(4, given.block_size)
