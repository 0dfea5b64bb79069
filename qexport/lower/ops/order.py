"""Sorting, and what is found by sorting or in what is sorted."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ..emitter import ONNX_DTYPE, Emitter, unsupported
from ..registry import Translation, translates
from .indexing import narrowed

aten, ops = torch.ops.aten, torch.ops.qexport
_SORTED = (torch.float32, torch.float64, torch.int32, torch.int64)  # what TopK has kernels for on the CPU


@translates(aten.sort.default, aten.sort.stable)
def _sort(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """Of equal elements the first stays first."""
    return _sorted(emit, given.self, given.dim, descending=given.descending)


def _sorted(emit: Emitter, source: Node, axis: int, *, descending: bool) -> tuple[ir.Value, ir.Value]:
    x, dtype = emit.get(source), dtype_of(source)
    if not shape_of(source):
        return x, emit.constant(0)
    wide = dtype if dtype in _SORTED or dtype.is_floating_point else torch.int32
    end = axis + 1 or None
    count = emit.op("Shape", x, start=axis, end=end)
    x = x if wide == dtype else emit.cast(x, wide)
    values, places = emit.several(2, "TopK", x, count, axis=axis, largest=int(descending), sorted=1)
    return values if wide == dtype else emit.cast(values, dtype), places


@translates(ops.highest.default)
def _highest(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x = emit.get(given.scores)
    count = emit.op("Min", emit.op("Shape", x, start=-1), emit.constant([given.count]))
    return emit.several(2, "TopK", x, count, axis=-1, largest=1, sorted=1)[1]


@translates(aten.kthvalue.default)
def _kth(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _one_of(emit, given, emit.constant([given.k - 1]))


@translates(aten.median.dim)
def _median(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """The lower one of two in the middle."""
    count = emit.op("Shape", emit.get(given.self), start=given.dim, end=given.dim + 1 or None)
    return _one_of(emit, given, emit.op("Div", emit.op("Sub", count, emit.constant(1)), emit.constant(2)))


def _one_of(emit: Emitter, given: Arguments, place: ir.Value) -> tuple[ir.Value, ...]:
    """What stands at a place [1] of the sorted axis, and where it was."""
    found = _sorted(emit, given.self, given.dim, descending=False)
    kept = [emit.op("Gather", value, place, axis=given.dim) for value in found]
    if given.keepdim:
        return tuple(kept)
    return tuple(emit.op("Squeeze", value, emit.constant([given.dim])) for value in kept)


@translates(aten.searchsorted.Tensor)
def _searchsorted(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if given.sorter is not None:
        raise unsupported(node, "with a sorter")
    right = given.right or given.side == "right"
    return _places(emit, node, given.sorted_sequence, given.self, right)


@translates(aten.bucketize.Tensor)
def _bucketize(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _places(emit, node, given.boundaries, given.self, given.right)


def _places(emit: Emitter, node: Node, bounds: Node, values: Node, right: bool) -> ir.Value:
    """How many bounds are below each value, or (`right`) not above it: every value is compared with every bound."""
    dtype = torch.promote_types(dtype_of(bounds), dtype_of(values))
    several = len(shape_of(bounds)) > 1
    row = emit.get(bounds, dtype)
    row = emit.op("Unsqueeze", row, emit.constant([-2])) if several else row
    column = emit.op("Unsqueeze", emit.get(values, dtype), emit.constant([-1]))
    below = emit.op("LessOrEqual" if right else "Less", row, column)
    counted = emit.op("Cast", below, to=ONNX_DTYPE[dtype_of(node)])
    return emit.op("ReduceSum", counted, emit.constant([-1]), keepdims=0)


def _extreme(reduced: str, argument: str) -> Translation:
    """The smallest or largest element of an axis, and where it is."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
        x, keep = emit.get(given.self), int(given.keepdim)
        found = emit.op(reduced, x, emit.constant([given.dim]), keepdims=keep)
        sought = narrowed(emit, given.self) if argument == "ArgMin" else x  # ArgMax takes int64 as it is
        return found, emit.op(argument, sought, axis=given.dim, keepdims=keep)

    return translate


translates(aten.min.dim)(_extreme("ReduceMin", "ArgMin"))
translates(aten.max.dim)(_extreme("ReduceMax", "ArgMax"))
