"""Complex numbers, which a file has as pairs of their parts in a last axis, and Fourier transforms."""

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ...graph.views import Operand, Slice
from ..emitter import Emitter, unsupported
from ..registry import Translation, translates_complex

aten = torch.ops.aten


@translates_complex(aten.view_as_real.default, aten.view_as_complex.default)
def _viewed(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Pairs are float32 in a file of smaller floats, too."""
    x, now, then = emit.get(given.self), _of_parts(given.self), _of_parts(node)
    return x if now == then else emit.cast(x, then)


def _of_parts(node: Node) -> torch.dtype:
    """The type of a value's numbers, or of the parts of complex ones."""
    return dtype_of(node).to_real()


@translates_complex(aten.resolve_conj.default, aten.resolve_neg.default)
def _same(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x: ir.Value = emit.get(given.self)
    return x


def _part(emit: Emitter, pairs: ir.Value, part: int) -> ir.Value:
    return emit.op("Gather", pairs, emit.constant(part), axis=-1)


def _joined(emit: Emitter, real: ir.Value, imaginary: ir.Value) -> ir.Value:
    last = emit.constant([-1])
    return emit.op("Concat", *(emit.op("Unsqueeze", part, last) for part in (real, imaginary)), axis=-1)


@translates_complex(aten.real.default)
def _real(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _part(emit, emit.get(given.self), 0)


@translates_complex(aten.imag.default)
def _imag(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _part(emit, emit.get(given.self), 1)


@translates_complex(aten.complex.default)
def _complex(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _joined(emit, emit.get(given.real), emit.get(given.imag))


@translates_complex(aten._to_copy.default)
def _of_real(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """A real value as a complex one, or the other way round; pairs are float32 whatever the complex numbers are."""
    if dtype_of(given.self).is_complex:
        return _viewed(emit, node, given) if dtype_of(node).is_complex else _part(emit, emit.get(given.self), 0)
    real = emit.get(given.self, torch.float32)
    return _joined(emit, real, emit.op("Mul", real, emit.constant(0.0, torch.float32)))


@translates_complex(aten.polar.default)
def _polar(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    size, angle = emit.get(given.abs), emit.get(given.angle)
    return _joined(emit, *(emit.op("Mul", size, emit.op(function, angle)) for function in ("Cos", "Sin")))


@translates_complex(aten.abs.default)
def _abs(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("ReduceL2", emit.get(given.self), emit.constant([-1]), keepdims=0)


@translates_complex(aten._conj.default, aten.conj_physical.default, aten._conj_physical.default)
def _conj(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _conjugate(emit, emit.get(given.self))


def _conjugate(emit: Emitter, pairs: ir.Value) -> ir.Value:
    return emit.op("Mul", pairs, emit.constant([1.0, -1.0], torch.float32))


@translates_complex(aten.neg.default)
def _neg(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Neg", emit.get(given.self))


def _operand(emit: Emitter, operand: Operand) -> tuple[ir.Value, bool]:
    """An operand, and whether it is complex; a real one stands beside pairs."""
    if not isinstance(operand, Node):
        return emit.constant(float(operand), torch.float32), False
    value = emit.get(operand)
    if dtype_of(operand).is_complex:
        return value, True
    return emit.op("Unsqueeze", emit.get(operand, torch.float32), emit.constant([-1])), False


def _sum(op_type: str) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        (left, first), (right, second) = _operand(emit, given.self), _operand(emit, given.other)
        if not (first and second) or given.alpha != 1:
            raise unsupported(node, "of a complex and a real number, or with a factor,")
        return emit.op(op_type, left, right)

    return translate


translates_complex(aten.add.Tensor)(_sum("Add"))
translates_complex(aten.sub.Tensor)(_sum("Sub"))


@translates_complex(aten.mul.Tensor)
def _mul(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (left, first), (right, second) = _operand(emit, given.self), _operand(emit, given.other)
    if not (first and second):
        return emit.op("Mul", left, right)
    a, b, c, d = (_part(emit, value, part) for value in (left, right) for part in (0, 1))
    real = emit.op("Sub", emit.op("Mul", a, c), emit.op("Mul", b, d))
    return _joined(emit, real, emit.op("Add", emit.op("Mul", a, d), emit.op("Mul", b, c)))


@translates_complex(aten.div.Tensor)
def _div(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (left, _), (right, second) = _operand(emit, given.self), _operand(emit, given.other)
    if second:
        raise unsupported(node, "by a complex number")
    return emit.op("Div", left, right)


@translates_complex(aten.permute.default)
def _permute(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    rank = len(shape_of(node))
    return emit.op("Transpose", emit.get(given.self), perm=[*(axis % rank for axis in given.dims), rank])


@translates_complex(aten.transpose.int)
def _transpose(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    order = list(range(len(shape_of(node)) + 1))
    first, second = (axis % len(shape_of(node)) for axis in (given.dim0, given.dim1))
    order[first], order[second] = order[second], order[first]
    return emit.op("Transpose", emit.get(given.self), perm=order)


@translates_complex(aten.unsqueeze.default)
def _unsqueeze(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Unsqueeze", emit.get(given.self), emit.constant([given.dim % len(shape_of(node))]))


@translates_complex(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    sizes, dims = shape_of(given.self), [given.dim] if isinstance(given.dim, int) else given.dim
    single = [axis % len(sizes) for axis in dims if sizes[axis] == 1]
    return emit.op("Squeeze", emit.get(given.self), emit.constant(single)) if single else emit.get(given.self)


@translates_complex(aten.view.default, aten.reshape.default)
def _reshape(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    sizes = given.size if hasattr(given, "size") else given.shape
    return emit.op("Reshape", emit.get(given.self), emit.shape([*sizes, 2]))


@translates_complex(aten.expand.default)
def _expand(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Expand", emit.get(given.self), emit.shape([*(1 if s == -1 else s for s in given.size), 2]))


@translates_complex(aten.slice.Tensor)
def _slice(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    cut = Slice.of(node)
    bounds, axis = [emit.shape([bound]) for bound in cut.bounds], cut.dim % len(shape_of(node))
    return emit.op("Slice", emit.get(cut.x), *bounds, emit.constant([axis]), emit.constant([cut.step]))


@translates_complex(aten.select.int)
def _select(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Gather", emit.get(given.self), emit.get(given.index), axis=given.dim % len(shape_of(given.self)))


@translates_complex(aten.cat.default)
def _cat(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Concat", *map(emit.get, given.tensors), axis=given.dim % len(shape_of(node)))


@translates_complex(aten._fft_r2c.default)
def _fft_of_reals(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Onesided along the last of the axes, which the others follow."""
    x = emit.op("Unsqueeze", emit.get(given.self), emit.constant([-1]))
    *others, last = _axes(given.dim, given.self)
    made = emit.op("DFT", x, None, emit.constant(last), onesided=int(given.onesided))
    for axis in others:
        made = emit.op("DFT", made, None, emit.constant(axis))
    return _scaled(emit, made, node, given, given.self, forward=True)


@translates_complex(aten._fft_c2c.default)
def _fft(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    made: ir.Value = emit.get(given.self)
    for axis in _axes(given.dim, given.self):
        made = emit.op("DFT", made, None, emit.constant(axis), inverse=int(not given.forward))
    return _scaled(emit, made, node, given, given.self, given.forward)


@translates_complex(aten._fft_c2r.default)
def _fft_to_reals(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Of half a spectrum, whose other half is its mirror."""
    made: ir.Value = emit.get(given.self)
    *others, last = _axes(given.dim, given.self)
    for axis in others:
        made = emit.op("DFT", made, None, emit.constant(axis), inverse=1)
    count, along, one = given.last_dim_size, emit.constant([last]), emit.constant([1])
    if not isinstance(count, int):
        raise unsupported(node, "of a size that is not known")
    half = count // 2 + 1
    kept = emit.op("Slice", made, emit.constant([0]), emit.constant([half]), along, one)
    mirror = emit.op("Slice", made, emit.constant([count - half]), emit.constant([0]), along, emit.constant([-1]))
    whole = emit.op("Concat", kept, _conjugate(emit, mirror), axis=last)
    made = _part(emit, emit.op("DFT", whole, None, emit.constant(last), inverse=1), 0)
    return _scaled(emit, made, node, given, node, forward=False)


def _axes(dims: Sequence[int], x: Node) -> list[int]:
    return [axis % len(shape_of(x)) for axis in dims]


def _scaled(emit: Emitter, made: ir.Value, node: Node, given: Arguments, sized: Node, forward: bool) -> ir.Value:
    """A transform divided by nothing, by the root of the number of elements or by it; ONNX's inverse is divided.

    Args:
        sized: a value that has as many elements along the axes as are transformed.
    """
    sizes = [shape_of(sized)[axis] for axis in given.dim]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        if given.normalization == (0 if forward else 2):
            return made
        raise unsupported(node, "of a size that is not known")
    count = math.prod(known)
    factor = {0: 1.0, 1: count**-0.5, 2: 1 / count}[given.normalization] * (1 if forward else count)
    return made if factor == 1 else emit.op("Mul", made, emit.constant(factor, torch.float32))
