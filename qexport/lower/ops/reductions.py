"""Axes brought to one number: whether any, products, variances, norms and distances."""

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ...graph.views import size_at
from ..emitter import Emitter
from ..registry import translates

aten = torch.ops.aten


@translates(aten.any.default, aten.any.dim, aten.any.dims)
def _any(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _some(emit, emit.get(given.self, torch.bool), given)


@translates(aten.all.default, aten.all.dim, aten.all.dims)
def _all(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Not", _some(emit, emit.op("Not", emit.get(given.self, torch.bool)), given))


def _some(emit: Emitter, truth: ir.Value, given: Arguments) -> ir.Value:
    """Whether any is true, which none of nothing is."""
    axes, keep = emit.axes(getattr(given, "dim", None)), int(getattr(given, "keepdim", False))
    count = emit.op("ReduceSum", emit.cast(truth, torch.int32), axes, keepdims=keep)
    return emit.op("Greater", count, emit.constant(0, torch.int32))


@translates(aten.prod.default, aten.prod.dim_int)
def _prod(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    axes, keep = emit.axes(getattr(given, "dim", None)), int(getattr(given, "keepdim", False))
    return emit.op("ReduceProd", emit.get(given.self, dtype_of(node)), axes, keepdims=keep)


@translates(torch.ops.prims.prod.default)
def _primitive_prod(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("ReduceProd", emit.get(given.inp, dtype_of(node)), emit.axes(given.dims), keepdims=0)


@translates(aten.var.correction)
def _var(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _variance(emit, given)[0]


@translates(aten.std.correction)
def _std(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Sqrt", _variance(emit, given)[0])


@translates(aten.var_mean.correction)
def _var_mean(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _variance(emit, given)


@translates(aten.std_mean.correction)
def _std_mean(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    variance, mean = _variance(emit, given)
    return emit.op("Sqrt", variance), mean


def _variance(emit: Emitter, given: Arguments) -> tuple[ir.Value, ir.Value]:
    """Variance and mean."""
    x, axes, keep = emit.get(given.self), emit.axes(given.dim), int(given.keepdim)
    correction = 1 if given.correction is None else given.correction
    centred = emit.op("Sub", x, emit.op("ReduceMean", x, axes, keepdims=1))
    total = emit.op("ReduceSum", emit.op("Mul", centred, centred), axes, keepdims=keep)
    variance = emit.op("Div", total, _count(emit, given.self, given.dim, float(correction)))
    return variance, emit.op("ReduceMean", x, axes, keepdims=keep)


def _count(emit: Emitter, x: Node, dims: int | Sequence[int] | None, less: float) -> ir.Value:
    """How many elements the axes have, less some, as a number of x's dtype that is not below zero."""
    sizes, rank = shape_of(x), len(shape_of(x))
    named = [dims] if isinstance(dims, int) else dims or range(rank)
    axes = [axis % rank for axis in named]
    known = [size for size in (sizes[axis] for axis in axes) if isinstance(size, int)]
    if len(known) == len(axes):
        return emit.constant(max(0.0, math.prod(known) - less), dtype_of(x))
    picked = emit.op("Gather", emit.op("Shape", emit.get(x)), emit.constant(list(axes)))
    count = emit.cast(emit.op("ReduceProd", picked, keepdims=0), dtype_of(x))
    return emit.op("Max", emit.op("Sub", count, emit.constant(less, dtype_of(x))), emit.constant(0, dtype_of(x)))


def length(
    emit: Emitter, x: ir.Value, order: float, dims: int | Sequence[int] | None, keep: bool, dtype: torch.dtype
) -> ir.Value:
    """The norm of vectors along axes, of any order."""
    axes, keepdims = emit.axes(dims), int(keep)
    if order in (1, 2):
        return emit.op("ReduceL1" if order == 1 else "ReduceL2", x, axes, keepdims=keepdims)
    size = emit.op("Abs", x)
    if math.isinf(order):
        return emit.op("ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdims=keepdims)
    if order == 0:
        differs = emit.cast(emit.op("Not", emit.op("Equal", x, emit.constant(0, dtype))), dtype)
        return emit.op("ReduceSum", differs, axes, keepdims=keepdims)
    total = emit.op("ReduceSum", emit.op("Pow", size, emit.constant(order, dtype)), axes, keepdims=keepdims)
    return emit.op("Pow", total, emit.constant(1 / order, dtype))


@translates(aten.linalg_vector_norm.default)
def _vector_norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    return length(emit, emit.get(given.self, dtype), given.ord, given.dim, given.keepdim, dtype)


@translates(aten.norm.ScalarOpt_dim)
def _norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    order = 2 if given.p is None else given.p
    return length(emit, emit.get(given.self), order, given.dim, given.keepdim, dtype_of(node))


@translates(aten._cdist_forward.default)
def _cdist(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Distances of every row of one to every row of the other."""
    left = emit.op("Unsqueeze", emit.get(given.x1), emit.constant([-2]))
    right = emit.op("Unsqueeze", emit.get(given.x2), emit.constant([-3]))
    return length(emit, emit.op("Sub", left, right), given.p, -1, False, dtype_of(node))


@translates(aten._pdist_forward.default)
def _pdist(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Distances of every row to those behind it."""
    rows = torch.triu_indices(size_at(given.self, 0), size_at(given.self, 0), 1)
    left, right = (emit.op("Gather", emit.get(given.self), emit.constant(places.tolist())) for places in rows)
    return length(emit, emit.op("Sub", left, right), given.p, -1, False, dtype_of(node))


@translates(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("LogSoftmax", emit.get(given.self, dtype_of(node)), axis=given.dim)


@translates(aten.logcumsumexp.default)
def _logcumsumexp(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """What is far below the largest of an axis is lost in front of it, as float32 cannot hold its exponential."""
    x = emit.get(given.self, dtype_of(node))
    largest = emit.op("ReduceMax", x, emit.constant([given.dim]), keepdims=1)
    powers = emit.op("Exp", emit.op("Sub", x, largest))
    return emit.op("Add", emit.op("Log", emit.op("CumSum", powers, emit.constant(given.dim))), largest)
