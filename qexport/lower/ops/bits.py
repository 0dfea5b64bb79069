"""Bits of integers, and truth values."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ..emitter import Emitter
from ..registry import Translation, translates
from .real_functions import remainder

aten = torch.ops.aten


def _bitwise(op_type: str) -> Translation:
    """Of the bits of integers; of truth values as they are."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        dtype = dtype_of(node)
        name = op_type if dtype == torch.bool else f"Bitwise{op_type}"
        return emit.op(name, emit.get(given.self, dtype), emit.get(given.other, dtype))

    return translate


translates(
    aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.bitwise_and.Scalar_Tensor, aten.__and__.Tensor,
    aten.__and__.Scalar,
)(_bitwise("And"))  # fmt: skip
translates(
    aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.bitwise_or.Scalar_Tensor, aten.__or__.Tensor,
    aten.__or__.Scalar,
)(_bitwise("Or"))  # fmt: skip
translates(
    aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.bitwise_xor.Scalar_Tensor, aten.__xor__.Tensor,
    aten.__xor__.Scalar,
)(_bitwise("Xor"))  # fmt: skip


@translates(aten.bitwise_not.default)
def _not(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Not" if dtype_of(node) == torch.bool else "BitwiseNot", emit.get(given.self))


@translates(aten.logical_not.default)
def _logical_not(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Not", emit.get(given.self, torch.bool))


def _logical(op_type: str) -> Translation:
    return lambda emit, node, given: emit.op(
        op_type, emit.get(given.self, torch.bool), emit.get(given.other, torch.bool)
    )


translates(aten.logical_and.default)(_logical("And"))
translates(aten.logical_or.default)(_logical("Or"))
translates(aten.logical_xor.default)(_logical("Xor"))


def _shift(left: bool) -> Translation:
    """As products and quotients by powers of 2: BitShift takes unsigned integers alone."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        dtype = dtype_of(node)
        x, power = emit.get(given.self, dtype), emit.op("Pow", emit.constant(2, dtype), emit.get(given.other, dtype))
        if left:
            return emit.op("Mul", x, power)
        return emit.op("Div", emit.op("Sub", x, remainder(emit, x, power, dtype)), power)

    return translate


translates(
    aten.__lshift__.Scalar, aten.__lshift__.Tensor, aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
)(_shift(left=True))  # fmt: skip
translates(
    aten.__rshift__.Scalar, aten.__rshift__.Tensor, aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
)(_shift(left=False))  # fmt: skip
