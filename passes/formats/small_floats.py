"""Weights of 4-bit and 8-bit floats in a graph: their bits, and ONNX Runtime's kernels for them where it has some."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.edit import add_tensor, call, is_call
from ...graph.schema import bind
from ...graph.views import RoundE4M3
from ...quant.formats.base import QuantizedWeight
from ...quant.formats.nvfp4 import NVFP4
from ...quant.formats.small_floats import SmallFloatFormat, decoded, format_named
from .base import GraphForm, graph_form

ops = torch.ops.qexport
_INTEGERS = "MatMulNBits"


@torch.library.custom_op("qexport::dequantize_floats", mutates_args=())
def dequantize_floats(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, name: str) -> Tensor:
    """The weight that small floats stand for, transposed: float32 [in_features, out_features].

    Args:
        codes: uint8 [N, K], the bits of a number each.
        scale, tensor_scale: as the format has them in a file.
        name: of the format, see `formats.small_floats`.
    """
    return decoded(codes, scale, tensor_scale, name).t().contiguous()


@dequantize_floats.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor | None, name: str) -> torch.Tensor:
    return scale.new_empty((codes.shape[1], codes.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qexport::matmul_floats", mutates_args=())
def matmul_floats(
    x: Tensor, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, name: str, input_scale: Tensor | None = None
) -> Tensor:
    """x times the weight of `dequantize_floats`, as one kernel.

    Args:
        x: [..., K].
        input_scale: float32 []; x is rounded to E4M3 numbers times it.

    Returns:
        [..., N].
    """
    if input_scale is not None:
        x = ops.round_e4m3(x, input_scale)
    return x @ decoded(codes, scale, tensor_scale, name).t().to(x.dtype)


@matmul_floats.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor | None, name: str,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qexport::matmul_floats_as_integers", mutates_args=())
def matmul_floats_as_integers(
    x: Tensor, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, name: str
) -> Tensor:
    """The same with a weight of integers, which E2M1 numbers times two are, in groups."""
    return x @ decoded(codes, scale, tensor_scale, name).t().to(x.dtype)


@matmul_floats_as_integers.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor | None, name: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@graph_form(SmallFloatFormat)
class SmallFloatForm(GraphForm):
    """dequantize_floats(codes [N, K], scale, scale of the whole): a MatMul of a weight that is unpacked once, at load.

    Where ONNX Runtime has a kernel for the numbers, a product is that; else E2M1 numbers become integers of 8 bits when
    the file is loaded, and the product is a MatMulNBits.
    """

    operator = ops.dequantize_floats.default
    kernel_operator = ops.matmul_floats.default
    other_kernel_operators = (ops.matmul_floats_as_integers.default,)

    def insert(self, module: GraphModule, name: str, weight: QuantizedWeight, factor: Tensor | None = None) -> Node:
        if not isinstance(fmt := weight.format, SmallFloatFormat):
            raise TypeError(f"{fmt} has no small floats")
        graph, whole = module.graph, None
        codes = add_tensor(graph, f"{name}.weight_codes", weight.codes)
        scale = add_tensor(graph, f"{name}.weight_scale", fmt.stored_scale(weight.scale))
        if isinstance(fmt, NVFP4):
            whole = add_tensor(graph, f"{name}.tensor_scale", torch.tensor(fmt.tensor_scale))
        rows, columns = weight.shape
        arguments = (codes, scale, whole, fmt.name)
        return call(graph, self.operator, arguments, like=scale, dtype=torch.float32, shape=(columns, rows))

    def why_not_beside(self, weight: Node) -> str:
        return "its codes are floats"

    def input_block(self, weight: Node, whole: bool = False) -> int | None:
        fmt = format_named(bind(weight).name)
        return fmt.group_size if fmt.integers and not whole else None  # operators of ONNX alone multiply floats

    def own_product(self, x: Node, weight: Node, kernels: Collection[str]) -> tuple[Any, tuple[Any, ...]] | None:
        given = bind(weight)
        fmt, arguments = format_named(given.name), (given.codes, given.scale, given.tensor_scale, given.name)
        if native_kernel(fmt) in kernels:
            rounded = RoundE4M3.match(x)
            if rounded is None:
                return self.kernel_operator, (x, *arguments)
            return self.kernel_operator, (rounded.x, *arguments, rounded.scale)
        if fmt.integers and _INTEGERS in kernels:
            return ops.matmul_floats_as_integers.default, (x, *arguments)
        return None

    def kernel_at(self, product: Node) -> str:
        native = is_call(product, self.kernel_operator)
        return native_kernel(format_named(bind(product).name)) if native else _INTEGERS


def native_kernel(fmt: SmallFloatFormat) -> str:
    """The ONNX operator that reads the numbers of a format as they are."""
    return f"MatMulBlockQuantizedFp{fmt.bits}Weight"
