"""Functions of real numbers: trigonometry, logarithms, rounding, signs, and division with a remainder."""

import math

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import Operand
from ..emitter import Emitter, unsupported
from ..registry import Translation, translates
from .elementwise import unary

aten = torch.ops.aten


translates(aten.acos.default)(unary("Acos"))
translates(aten.acosh.default)(unary("Acosh"))
translates(aten.asin.default)(unary("Asin"))
translates(aten.asinh.default)(unary("Asinh"))
translates(aten.atan.default)(unary("Atan"))
translates(aten.atanh.default)(unary("Atanh"))
translates(aten.cosh.default)(unary("Cosh"))
translates(aten.sinh.default)(unary("Sinh"))
translates(aten.tan.default)(unary("Tan"))
translates(aten.sign.default, aten.sgn.default)(unary("Sign"))


def _logarithm(base: float) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        dtype = dtype_of(node)
        return emit.op("Div", emit.op("Log", emit.get(given.self, dtype)), emit.constant(math.log(base), dtype))

    return translate


translates(aten.log2.default)(_logarithm(2.0))
translates(aten.log10.default)(_logarithm(10.0))


@translates(aten.exp2.default)
def _exp2(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Pow", emit.constant(2, dtype_of(node)), emit.get(given.self, dtype_of(node)))


@translates(aten.erfc.default, aten.special_erfc.default)
def _erfc(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    return emit.op("Sub", emit.constant(1, dtype), emit.op("Erf", emit.get(given.self, dtype)))


def _is(op_type: str) -> Translation:
    """Whether a number is of a kind that only floats have."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        x = emit.get(given.self)
        if dtype_of(given.self).is_floating_point:
            return emit.op(op_type, x)
        return emit.op("Not", emit.op("Equal", x, x))

    return translate


translates(aten.isnan.default)(_is("IsNaN"))
translates(aten.isinf.default)(_is("IsInf"))


@translates(aten.signbit.default)
def _signbit(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Whether a number is below zero; that of -0.0 is taken for that of 0."""
    return emit.op("Less", emit.get(given.self), emit.constant(0, dtype_of(given.self)))


@translates(aten.copysign.Tensor, aten.copysign.Scalar)
def _copysign(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """A number with the sign of another; -0.0 is taken for 0."""
    dtype = dtype_of(node)
    size, sign = emit.op("Abs", emit.get(given.self, dtype)), emit.get(given.other, dtype)
    return emit.op("Where", emit.op("Less", sign, emit.constant(0, dtype)), emit.op("Neg", size), size)


@translates(aten.trunc.default, aten.fix.default)
def _trunc(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x = emit.get(given.self)
    return toward_zero(emit, x) if dtype_of(node).is_floating_point else x


def toward_zero(emit: Emitter, x: ir.Value) -> ir.Value:
    """Floats without what is behind the point."""
    return emit.op("Mul", emit.op("Sign", x), emit.op("Floor", emit.op("Abs", x)))


@translates(aten.round.decimals)
def _round_decimals(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    factor = emit.constant(10.0**given.decimals, dtype_of(node))
    return emit.op("Div", emit.op("Round", emit.op("Mul", emit.get(given.self), factor)), factor)


@translates(aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """The remainder with the sign of the dividend."""
    dtype = dtype_of(node)
    return emit.op("Mod", emit.get(given.self, dtype), emit.get(given.other, dtype), fmod=1)


@translates(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def _remainder(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    return remainder(emit, emit.get(given.self, dtype), emit.get(given.other, dtype), dtype)


def remainder(emit: Emitter, x: ir.Value, by: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The remainder with the sign of the divisor."""
    if not dtype.is_floating_point:
        return emit.op("Mod", x, by)
    zero = emit.constant(0, dtype)
    rest = emit.op("Mod", x, by, fmod=1)
    other_side = emit.op("Xor", emit.op("Less", rest, zero), emit.op("Less", by, zero))
    other_side = emit.op("And", other_side, emit.op("Not", emit.op("Equal", rest, zero)))
    return emit.op("Where", other_side, emit.op("Add", rest, by), rest)


@translates(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _divided(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _quotient(emit, node, given.self, given.other, given.rounding_mode)


@translates(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divided(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _quotient(emit, node, given.self, given.other, "floor")


def _quotient(emit: Emitter, node: Node, left: Operand, right: Operand, rounding: str | None) -> ir.Value:
    dtype = dtype_of(node)
    x, by = emit.get(left, dtype), emit.get(right, dtype)
    if rounding is None:
        return emit.op("Div", x, by)
    if rounding == "trunc":
        quotient = emit.op("Div", x, by)  # which cuts integers off itself
        return toward_zero(emit, quotient) if dtype.is_floating_point else quotient
    if rounding != "floor":
        raise unsupported(node, f"with rounding {rounding!r}")
    whole = emit.op("Sub", x, remainder(emit, x, by, dtype))
    if not dtype.is_floating_point:
        return emit.op("Div", whole, by)
    exact = emit.op("Round", emit.op("Div", whole, by))  # 1 // 0.1 is 9, and 1 / 0.1 is 10
    return emit.op("Where", emit.op("Equal", by, emit.constant(0, dtype)), emit.op("Div", x, by), exact)


@translates(aten.atan2.default, aten.arctan2.default)
def _atan2(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """The angle of (x, y); that of two infinities is NaN, and zeros have no sign."""
    dtype = dtype_of(node)
    y, x, zero = emit.get(given.self, dtype), emit.get(given.other, dtype), emit.constant(0, dtype)
    angle, turn = emit.op("Atan", emit.op("Div", y, x)), emit.constant(math.pi, dtype)
    half = emit.op("Where", emit.op("Less", y, zero), emit.op("Neg", turn), turn)
    angle = emit.op("Where", emit.op("Less", x, zero), emit.op("Add", angle, half), angle)
    upright = emit.op("Mul", emit.op("Sign", y), emit.constant(math.pi / 2, dtype))
    return emit.op("Where", emit.op("Equal", x, zero), upright, angle)


@translates(aten.hypot.default)
def _hypot(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    squares = [emit.op("Mul", v, v) for v in (emit.get(given.self, dtype), emit.get(given.other, dtype))]
    return emit.op("Sqrt", emit.op("Add", *squares))
