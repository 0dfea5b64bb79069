"""Elementwise arithmetic, comparisons, activations, casts and reductions."""

import operator

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.convolution_sites import CONVOLUTIONS
from ...graph.edit import dtype_of, is_call, shape_of
from ...graph.schema import Arguments
from ...graph.views import Operand, sizes_of
from ..emitter import ONNX_DTYPE, Attribute, Emitter, unsupported
from ..fuse_norms import SAME_SHAPE
from ..registry import Translation, translates

aten = torch.ops.aten
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow")
_OF_TRUTH = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def unary(op_type: str, **attributes: Attribute) -> Translation:
    """An operator of one operand, in the dtype of its result."""
    return lambda emit, node, given: emit.op(op_type, emit.get(given.self, dtype_of(node)), more=attributes)


def _whole(op_type: str) -> Translation:
    """Rounding, which leaves integers as they are."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        x = emit.get(given.self)
        return emit.op(op_type, x) if dtype_of(node).is_floating_point else x

    return translate


translates(aten.neg.default)(unary("Neg"))
translates(aten.abs.default)(unary("Abs"))
translates(aten.exp.default)(unary("Exp"))
translates(aten.sqrt.default)(unary("Sqrt"))
translates(aten.cos.default)(unary("Cos"))
translates(aten.sin.default)(unary("Sin"))
translates(aten.tanh.default)(unary("Tanh"))
translates(aten.erf.default)(unary("Erf"))
translates(aten.sigmoid.default)(unary("Sigmoid"))
translates(aten.reciprocal.default)(unary("Reciprocal"))
translates(aten.round.default)(_whole("Round"))
translates(aten.floor.default)(_whole("Floor"))
translates(aten.ceil.default)(_whole("Ceil"))
translates(aten.log.default)(unary("Log"))
translates(aten.hardswish.default, aten.hardswish_.default)(unary("HardSwish"))
translates(aten.hardsigmoid.default)(unary("HardSigmoid", alpha=1 / 6, beta=0.5))


def _binary(op_type: str, left: str = "self", right: str = "other") -> Translation:
    """An operator of two operands, which the schema calls `left` and `right`."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        if getattr(given, "alpha", 1) != 1:
            return _with_alpha(emit, op_type, node, getattr(given, left), getattr(given, right), given.alpha)
        return _of_two(emit, op_type, getattr(given, left), getattr(given, right), dtype_of(node))

    return translate


def _of_two(emit: Emitter, op_type: str, left: Operand, right: Operand, dtype: torch.dtype) -> ir.Value:
    counts = op_type in _ARITHMETIC
    op_type = _OF_TRUTH.get(op_type, op_type) if dtype == torch.bool else op_type
    return emit.op(op_type, emit.get(left, dtype, counts=counts), emit.get(right, dtype, counts=counts))


def _with_alpha(emit: Emitter, op_type: str, node: Node, left: Operand, right: Operand, alpha: float) -> ir.Value:
    """An operator of one operand and a multiple of the other."""
    dtype = dtype_of(node)
    return emit.op(op_type, emit.get(left, dtype), emit.op("Mul", emit.get(right, dtype), emit.get(alpha, dtype)))


translates(aten.sub.Tensor, aten.sub.Scalar)(_binary("Sub"))
translates(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)(_binary("Mul"))
translates(aten.div.Tensor, aten.div.Scalar)(_binary("Div"))
translates(aten.maximum.default, aten.max.other)(_binary("Max"))
translates(aten.minimum.default, aten.min.other)(_binary("Min"))
translates(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)(_binary("Pow", right="exponent"))
translates(operator.add)(_binary("Add", "a", "b"))
translates(operator.sub)(_binary("Sub", "a", "b"))
translates(operator.mul)(_binary("Mul", "a", "b"))
translates(operator.floordiv)(_binary("Div", "a", "b"))
translates(operator.mod)(_binary("Mod", "a", "b"))
translates(operator.neg)(lambda emit, node, given: emit.op("Neg", emit.get(given.a, torch.int64)))
translates(torch.sym_max)(_binary("Max", "a", "b"))
translates(torch.sym_min)(_binary("Min", "a", "b"))


@translates(aten.add.Tensor, aten.add.Scalar)
def _add(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    values, other = given.self, given.other
    if given.alpha != 1:
        return _with_alpha(emit, "Add", node, values, other, given.alpha)
    if _is_size(other) and shape_of(values):
        return emit.op("Add", emit.get(values), _beside_tensors(emit, other, dtype_of(node)))
    total = _of_two(emit, "Add", values, other, dtype_of(node))
    same = isinstance(other, Node) and shape_of(other) == shape_of(values) and len(shape_of(values)) == 3
    emit.nodes[-1].meta[SAME_SHAPE] = same
    return total


def _is_size(argument: Operand) -> bool:
    """Whether an argument is a size, read in this block or before it."""
    if not isinstance(argument, Node) or (dtype_of(argument), shape_of(argument)) != (torch.int64, ()):
        return False
    return argument.op == "placeholder" or is_call(argument, aten.sym_size.int, operator.add)


def _beside_tensors(emit: Emitter, size: Node, dtype: torch.dtype) -> ir.Value:
    """A size as a tensor [1]: a range takes its ends from the CPU, where sizes are, and stands where tensors are."""
    value = emit.get(size)
    ranged = emit.op("Range", value, emit.op("Add", value, emit.constant(1)), emit.constant(1))
    return ranged if dtype == torch.int64 else emit.cast(ranged, dtype)


@translates(aten.rsub.Scalar)
def _reversed_sub(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if given.alpha != 1:
        return _with_alpha(emit, "Sub", node, given.other, given.self, given.alpha)
    return _of_two(emit, "Sub", given.other, given.self, dtype_of(node))


def _compare(op_type: str) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        dtype = _common(given)
        return _of_two(emit, op_type, given.self, given.other, torch.int32 if dtype == torch.bool else dtype)

    return translate


def _common(given: Arguments) -> torch.dtype:
    """The dtype in which two operands are compared."""
    tensors = [dtype_of(a) for a in (given.self, given.other) if isinstance(a, Node)]
    common = max(tensors, key=lambda dtype: (dtype.is_floating_point, dtype.itemsize))
    broken = any(isinstance(a, float) and not a.is_integer() for a in (given.self, given.other))
    return torch.float32 if broken and not common.is_floating_point else common


translates(aten.eq.Tensor, aten.eq.Scalar)(_compare("Equal"))
translates(aten.le.Tensor, aten.le.Scalar)(_compare("LessOrEqual"))
translates(aten.lt.Tensor, aten.lt.Scalar)(_compare("Less"))
translates(aten.ge.Tensor, aten.ge.Scalar)(_compare("GreaterOrEqual"))
translates(aten.gt.Tensor, aten.gt.Scalar)(_compare("Greater"))


@translates(aten.ne.Scalar, aten.ne.Tensor)
def _differs(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Not", _of_two(emit, "Equal", given.self, given.other, _common(given)))


@translates(aten.gelu.default)
def _gelu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Gelu", emit.get(given.self), approximate=given.approximate)


@translates(aten.silu.default, aten.silu_.default)
def _silu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x = emit.get(given.self)
    return emit.op("Mul", x, emit.op("Sigmoid", x))


@translates(aten.relu.default, aten.relu_.default)
def _relu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Max(x, 0): ONNX Runtime does not fuse a quantized MatMul whose only reader is a Relu; of convolutions it does."""
    if is_call(given.self, *CONVOLUTIONS):
        return emit.op("Relu", emit.get(given.self))
    return emit.op("Max", emit.get(given.self), emit.constant(0, dtype_of(node)))


@translates(aten.leaky_relu.default, aten.leaky_relu_.default)
def _leaky_relu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("LeakyRelu", emit.get(given.self), alpha=float(given.negative_slope))


@translates(aten.rrelu_with_noise_functional.default)
def _rrelu(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """Whose slope is random while it is trained, and the mean afterwards; the noise is of training alone."""
    if given.training:
        raise unsupported(node, "in training mode")
    return (emit.op("LeakyRelu", emit.get(given.self), alpha=float(given.lower + given.upper) / 2),)


@translates(aten.prelu.default)
def _prelu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """As what is above zero and what is below it: PRelu's own kernel on the CPU takes 4 to 8 times as long."""
    slope, x = given.weight, emit.get(given.self)
    beside = [*sizes_of(slope), *(1 for _ in shape_of(given.self)[2:])]  # of channels, the second dimension
    if slope.op == "get_attr":
        shaped = emit.derived(slope, "slope", beside, dtype_of(node), lambda weight: weight.view(beside))
    else:
        shaped = emit.op("Reshape", emit.get(slope, dtype_of(node)), emit.constant(beside))
    below = emit.op("Min", x, emit.constant(0.0, dtype_of(node)))
    return emit.op("Add", emit.op("Relu", x), emit.op("Mul", below, shaped))


@translates(aten.elu.default)
def _elu(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x, alpha = emit.get(given.self), float(given.alpha)
    if (given.scale, given.input_scale) == (1, 1):
        return emit.op("Elu", x, alpha=alpha)
    scale, zero = emit.constant(given.scale, dtype_of(node)), emit.constant(0, dtype_of(node))
    below = emit.op("Elu", emit.op("Mul", x, emit.constant(given.input_scale, dtype_of(node))), alpha=alpha)
    return emit.op("Mul", scale, emit.op("Where", emit.op("Greater", x, zero), x, below))


@translates(aten.softplus.default)
def _softplus(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x, dtype = emit.get(given.self, dtype_of(node)), dtype_of(node)
    if given.beta == 1:
        return emit.op("Softplus", x)
    beta = emit.constant(given.beta, dtype)
    return emit.op("Div", emit.op("Softplus", emit.op("Mul", x, beta)), beta)


@translates(
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default
)  # fmt: skip
def _cast(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    source: ir.Value = emit.get(given.self)
    if dtype_of(given.self) == dtype_of(node):
        return source
    return emit.op("Cast", source, to=ONNX_DTYPE[dtype_of(node)])


@translates(aten.rsqrt.default)
def _rsqrt(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Reciprocal", emit.op("Sqrt", emit.get(given.self, dtype_of(node))))


@translates(aten.square.default)
def _square(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x = emit.get(given.self)
    return emit.op("Mul", x, x)


@translates(aten.log1p.default)
def _log1p(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Log", emit.op("Add", emit.get(given.self, dtype_of(node)), emit.constant(1, dtype_of(node))))


@translates(aten.expm1.default)
def _expm1(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Sub", emit.op("Exp", emit.get(given.self, dtype_of(node))), emit.constant(1, dtype_of(node)))


def _reduce(op_type: str) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        axes = emit.axes(given.dim)
        return emit.op(op_type, emit.get(given.self, dtype_of(node)), axes, keepdims=int(given.keepdim))

    return translate


def _reduce_all(op_type: str) -> Translation:
    return lambda emit, node, given: emit.op(op_type, emit.get(given.self, dtype_of(node)), keepdims=0)


translates(aten.mean.dim)(_reduce("ReduceMean"))
translates(aten.sum.dim_IntList)(_reduce("ReduceSum"))
translates(aten.amax.default)(_reduce("ReduceMax"))
translates(aten.amin.default)(_reduce("ReduceMin"))
translates(aten.mean.default)(_reduce_all("ReduceMean"))
translates(aten.sum.default)(_reduce_all("ReduceSum"))


@translates(aten.where.self, aten.where.ScalarOther, aten.where.Scalar)
def _where(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    return emit.op("Where", emit.get(given.condition), emit.get(given.self, dtype), emit.get(given.other, dtype))


@translates(aten.softmax.int, aten._softmax.default)
def _softmax(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Softmax", emit.get(given.self, dtype_of(node)), axis=given.dim)


@translates(aten.topk.default)
def _topk(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return emit.several(
        2, "TopK", emit.get(given.self), emit.constant([given.k]), axis=given.dim, largest=int(given.largest),
        sorted=int(given.sorted),
    )  # fmt: skip


def _clipped(emit: Emitter, node: Node, x: Node, low: Operand | None, high: Operand | None) -> ir.Value:
    dtype = dtype_of(node)
    return emit.op("Clip", emit.get(x, dtype), *(emit.get(bound, dtype) for bound in (low, high)))


@translates(aten.clamp.default)
def _clamp(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _clipped(emit, node, given.self, given.min, given.max)


@translates(aten.hardtanh.default)
def _hardtanh(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _clipped(emit, node, given.self, given.min_val, given.max_val)


@translates(aten.clamp_min.default)
def _clamp_min(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _clipped(emit, node, given.self, given.min, None)


@translates(aten.clamp.Tensor)
def _clamp_by_tensor(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x: ir.Value = emit.get(given.self, dtype_of(node))
    for bound, op_type in ((given.min, "Max"), (given.max, "Min")):
        if bound is not None:
            x = emit.op(op_type, x, emit.get(bound, dtype_of(node)))
    return x
