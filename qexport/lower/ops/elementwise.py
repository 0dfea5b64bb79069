"""Elementwise arithmetic, comparisons, activations, casts and reductions."""

import operator

import torch
from torch.fx import Node

from ...passes.convolutions import CONVOLUTIONS
from ...passes.edit import dtype_of, is_call, shape_of
from ..emitter import ONNX_DTYPE, Emitter, unsupported
from ..fuse import SAME_SHAPE

aten = torch.ops.aten


def _unary(op_type: str, **attributes):
    return lambda emit, node: emit.op(op_type, emit.get(node.args[0], dtype_of(node)), **attributes)


def _binary(op_type: str):
    def translate(emit: Emitter, node: Node):
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            raise unsupported(node, f"with alpha={alpha}")
        dtype = dtype_of(node)
        return emit.op(op_type, emit.get(node.args[0], dtype), emit.get(node.args[1], dtype))

    return translate


def _add(emit: Emitter, node: Node):
    values, other = node.args[:2]
    if _is_size(other) and shape_of(values):
        return emit.op("Add", emit.get(values), _beside_tensors(emit, other, dtype_of(node)))
    total = _binary("Add")(emit, node)
    sides = [shape_of(a) if isinstance(a, Node) else () for a in node.args[:2]]
    total.producer().meta[SAME_SHAPE] = sides[0] == sides[1] and len(sides[0]) == 3
    return total


def _is_size(argument) -> bool:
    """Whether an argument is a size, read in this block or before it."""
    if not isinstance(argument, Node) or (dtype_of(argument), shape_of(argument)) != (torch.int64, ()):
        return False
    return argument.op == "placeholder" or is_call(argument, aten.sym_size.int, operator.add)


def _beside_tensors(emit: Emitter, size: Node, dtype: torch.dtype):
    """A size as a tensor [1]: a range takes its ends from the CPU, where sizes are, and stands where tensors are."""
    value = emit.get(size)
    ranged = emit.op("Range", value, emit.op("Add", value, emit.constant(1)), emit.constant(1))
    return ranged if dtype == torch.int64 else emit.cast(ranged, dtype)


def _compare(op_type: str, logical: bool = False):
    def translate(emit: Emitter, node: Node):
        tensors = [dtype_of(a) for a in node.args if isinstance(a, Node)]
        dtype = torch.bool if logical else max(tensors, key=lambda d: d.is_floating_point)
        return emit.op(op_type, *(emit.get(a, dtype) for a in node.args))

    return translate


def _gelu(emit: Emitter, node: Node):
    return emit.op("Gelu", emit.get(node.args[0]), approximate=node.kwargs.get("approximate", "none"))


def _silu(emit: Emitter, node: Node):
    x = emit.get(node.args[0])
    return emit.op("Mul", x, emit.op("Sigmoid", x))


def _relu(emit: Emitter, node: Node):
    """Max(x, 0): ONNX Runtime does not fuse a quantized MatMul whose only reader is a Relu; of convolutions it does."""
    if is_call(node.args[0], *CONVOLUTIONS):
        return emit.op("Relu", emit.get(node.args[0]))
    return emit.op("Max", emit.get(node.args[0]), emit.constant(0, dtype_of(node)))


def _cast(emit: Emitter, node: Node):
    source = emit.get(node.args[0])
    if dtype_of(node.args[0]) == dtype_of(node):
        return source
    return emit.op("Cast", source, to=ONNX_DTYPE[dtype_of(node)])


def _rsqrt(emit: Emitter, node: Node):
    return emit.op("Reciprocal", emit.op("Sqrt", emit.get(node.args[0])))


def _reduce(op_type: str):
    def translate(emit: Emitter, node: Node):
        axes = node.args[1] if len(node.args) > 1 else None
        axes = None if axes is None else emit.constant([axes] if isinstance(axes, int) else list(axes))
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        return emit.op(op_type, emit.get(node.args[0], dtype_of(node)), axes, keepdims=int(keep))

    return translate


def _where(emit: Emitter, node: Node):
    dtype = dtype_of(node)
    return emit.op("Where", emit.get(node.args[0]), emit.get(node.args[1], dtype), emit.get(node.args[2], dtype))


def _softmax(emit: Emitter, node: Node):
    return emit.op("Softmax", emit.get(node.args[0], dtype_of(node)), axis=node.args[1])


def _log1p(emit: Emitter, node: Node):
    return emit.op("Log", emit.op("Add", emit.get(node.args[0]), emit.constant(1, dtype_of(node))))


def _expm1(emit: Emitter, node: Node):
    return emit.op("Sub", emit.op("Exp", emit.get(node.args[0])), emit.constant(1, dtype_of(node)))


def _square(emit: Emitter, node: Node):
    x = emit.get(node.args[0])
    return emit.op("Mul", x, x)


def _differs(emit: Emitter, node: Node):
    return emit.op("Not", _compare("Equal")(emit, node))


def _masked_fill(emit: Emitter, node: Node):
    x, mask, value = node.args
    return emit.op("Where", emit.get(mask), emit.get(value, dtype_of(node)), emit.get(x))


def _cumsum(emit: Emitter, node: Node):
    return emit.op("CumSum", emit.get(node.args[0], dtype_of(node)), emit.constant(node.args[1]))


def _best(emit: Emitter, node: Node):
    """The largest element of an axis, and where it is."""
    x, axis, keep = emit.get(node.args[0]), node.args[1], int(len(node.args) > 2 and node.args[2])
    largest = emit.op("ReduceMax", x, emit.constant([axis]), keepdims=keep)
    return largest, emit.op("ArgMax", x, axis=axis, keepdims=keep)


def _topk(emit: Emitter, node: Node):
    x, count, axis, largest, ordered = (*node.args, *(-1, True, True)[len(node.args) - 2 :])
    return emit.op(
        "TopK", emit.get(x), emit.constant([count]), axis=axis, largest=int(largest), sorted=int(ordered), outputs=2
    )


def _clamp(emit: Emitter, node: Node):
    low, high = (list(node.args[1:]) + [None, None])[:2]
    if is_call(node, aten.hardtanh.default, aten.hardtanh_.default):
        low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
    dtype = dtype_of(node)
    return emit.op("Clip", emit.get(node.args[0]), *(None if b is None else emit.get(b, dtype) for b in (low, high)))


def _reversed_sub(emit: Emitter, node: Node):
    dtype = dtype_of(node)
    return emit.op("Sub", emit.get(node.args[1], dtype), emit.get(node.args[0], dtype))


def _relu6(emit: Emitter, node: Node):
    dtype = dtype_of(node)
    return emit.op("Clip", emit.get(node.args[0]), emit.constant(0.0, dtype), emit.constant(6.0, dtype))


def _leaky_relu(emit: Emitter, node: Node):
    return emit.op("LeakyRelu", emit.get(node.args[0]), alpha=float(node.args[1] if len(node.args) > 1 else 0.01))


def _elu(emit: Emitter, node: Node):
    if len(node.args) > 2:
        raise unsupported(node, "with a scale")
    return emit.op("Elu", emit.get(node.args[0]), alpha=float(node.args[1] if len(node.args) > 1 else 1.0))


def _vector_norm(emit: Emitter, node: Node):
    x, order, axes, keep = (*node.args, *(2, None, False)[len(node.args) - 1 :])[:4]
    if order not in (1, 2, None):
        raise unsupported(node, f"of order {order}")
    axes = None if axes is None else emit.constant([axes] if isinstance(axes, int) else list(axes))
    return emit.op("ReduceL1" if order == 1 else "ReduceL2", emit.get(x), axes, keepdims=int(keep))


def _clamp_by_tensor(emit: Emitter, node: Node):
    given = dict(zip(("self", "min", "max"), node.args, strict=False)) | node.kwargs
    x = emit.get(given["self"])
    for bound, op_type in (("min", "Max"), ("max", "Min")):
        if given.get(bound) is not None:
            x = emit.op(op_type, x, emit.get(given[bound], dtype_of(node)))
    return x


TRANSLATIONS = {
    aten.add.Tensor: _add, aten.sub.Tensor: _binary("Sub"), aten.mul.Tensor: _binary("Mul"),
    aten.multiply.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"), aten.pow.Tensor_Scalar: _binary("Pow"), aten.pow.Tensor_Tensor: _binary("Pow"),
    aten.maximum.default: _binary("Max"), aten.minimum.default: _binary("Min"),
    operator.add: _binary("Add"), operator.sub: _binary("Sub"), operator.mul: _binary("Mul"),
    operator.floordiv: _binary("Div"),
    aten.neg.default: _unary("Neg"), aten.abs.default: _unary("Abs"), aten.exp.default: _unary("Exp"),
    aten.sqrt.default: _unary("Sqrt"), aten.cos.default: _unary("Cos"), aten.sin.default: _unary("Sin"),
    aten.tanh.default: _unary("Tanh"), aten.erf.default: _unary("Erf"), aten.relu.default: _relu,
    aten.relu_.default: _relu, aten.sigmoid.default: _unary("Sigmoid"), aten.reciprocal.default: _unary("Reciprocal"),
    aten.round.default: _unary("Round"),
    aten.log.default: _unary("Log"), aten.softplus.default: _unary("Softplus"), aten.bitwise_not.default: _unary("Not"),
    aten.logical_not.default: _unary("Not"), aten.rsqrt.default: _rsqrt,
    aten.gelu.default: _gelu, aten.silu.default: _silu, aten.silu_.default: _silu,
    aten.le.Tensor: _compare("LessOrEqual"), aten.lt.Tensor: _compare("Less"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.gt.Tensor: _compare("Greater"), aten.eq.Tensor: _compare("Equal"), aten.le.Scalar: _compare("LessOrEqual"),
    aten.lt.Scalar: _compare("Less"), aten.ge.Scalar: _compare("GreaterOrEqual"), aten.gt.Scalar: _compare("Greater"),
    aten.eq.Scalar: _compare("Equal"), aten.bitwise_and.Tensor: _compare("And", logical=True),
    aten.logical_and.default: _compare("And", logical=True), aten.bitwise_or.Tensor: _compare("Or", logical=True),
    aten.to.dtype: _cast, aten.to.device: _cast, aten.to.dtype_layout: _cast, aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.mean.dim: _reduce("ReduceMean"), aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.square.default: _square, aten.floor.default: _unary("Floor"), aten.log1p.default: _log1p,
    aten.expm1.default: _expm1, aten.min.other: _binary("Min"), aten.max.other: _binary("Max"),
    aten.pow.Scalar: _binary("Pow"), aten.ne.Scalar: _differs, aten.ne.Tensor: _differs,
    aten.masked_fill.Scalar: _masked_fill, aten.masked_fill.Tensor: _masked_fill, aten.topk.default: _topk,
    aten.cumsum.default: _cumsum, aten.max.dim: _best, torch.sym_max: _binary("Max"), torch.sym_min: _binary("Min"),
    aten.where.self: _where, aten.where.ScalarOther: _where, aten.where.Scalar: _where, aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp_by_tensor, aten.clamp_min.default: _clamp,
    aten.__and__.Tensor: _compare("And", logical=True), aten.__or__.Tensor: _compare("Or", logical=True),
    aten.rsub.Scalar: _reversed_sub,
    aten.ceil.default: _unary("Ceil"),
    aten.hardtanh.default: _clamp, aten.hardtanh_.default: _clamp, aten.relu6.default: _relu6,
    aten.hardswish.default: _unary("HardSwish"), aten.hardswish_.default: _unary("HardSwish"),
    aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.leaky_relu.default: _leaky_relu, aten.leaky_relu_.default: _leaky_relu, aten.elu.default: _elu,
    aten.mean.default: _reduce("ReduceMean"), aten.sum.default: _reduce("ReduceSum"),
    aten.linalg_vector_norm.default: _vector_norm, aten.norm.ScalarOpt_dim: _vector_norm,
}  # fmt: skip
