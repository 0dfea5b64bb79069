"""Elements put, added or gathered by several indices at once, and bags of rows."""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ..emitter import Emitter, unsupported
from ..registry import Translation, translates

aten = torch.ops.aten
Indices = Sequence[Node | None]


@translates(aten.index.Tensor)
def _index(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """x[i, j, ...] with integer tensors for some dimensions."""
    source, indices = given.self, given.indices
    axes = _indexed(indices)
    if any(dtype_of(indices[axis]) in (torch.bool, torch.uint8) for axis in axes):
        raise unsupported(node, "with a mask makes a size that depends on values and")
    if len(axes) == 1:
        return emit.op("Gather", emit.get(source), emit.get(indices[axes[0]]), axis=axes[0])
    front = _Front(source, indices)
    return front.back(emit, emit.op("GatherND", front.turned(emit, emit.get(source)), _places(emit, indices)))


def _indexed(indices: Indices) -> list[int]:
    return [axis for axis, index in enumerate(indices) if index is not None]


def _places(emit: Emitter, indices: Indices) -> ir.Value:
    """Places as vectors behind the shape that all indices have together."""
    places = [emit.get(index, torch.int64) for index in indices if index is not None]
    nothing = places[0]  # zeros of that shape
    for other in places[1:]:
        nothing = emit.op("Add", nothing, other)
    nothing = emit.op("Sub", nothing, nothing)
    last = emit.constant([-1])
    places = [emit.op("Unsqueeze", emit.op("Add", place, nothing), last) for place in places]
    return places[0] if len(places) == 1 else emit.op("Concat", *places, axis=-1)


class _Front:
    """The order of axes in which those with indices come first, as GatherND and ScatterND have them.

    Attributes:
        order: of the axes of the source.
        result: of the axes of what is gathered so, as PyTorch returns it: what the indices make stands where the first
            of them is if they are side by side, else in front.
    """

    def __init__(self, source: Node, indices: Indices):
        axes, rank = _indexed(indices), len(shape_of(source))
        made = max(len(shape_of(index)) for index in indices if index is not None)
        rest = [axis for axis in range(rank) if axis not in axes]
        self.order = [*axes, *rest]
        together = axes == list(range(axes[0], axes[-1] + 1))
        before = axes[0] if together else 0
        self.result = [*range(made, made + before), *range(made), *range(made + before, made + len(rest))]

    def turned(self, emit: Emitter, x: ir.Value) -> ir.Value:
        """The source with the axes in order."""
        return _transposed(emit, x, self.order)

    def restored(self, emit: Emitter, x: ir.Value) -> ir.Value:
        """What `turned` was given."""
        return _transposed(emit, x, _inverse(self.order))

    def back(self, emit: Emitter, gathered: ir.Value) -> ir.Value:
        """The gathered elements as PyTorch returns them."""
        return _transposed(emit, gathered, self.result)

    def forth(self, emit: Emitter, values: ir.Value) -> ir.Value:
        """What `back` was given."""
        return _transposed(emit, values, _inverse(self.result))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


def _transposed(emit: Emitter, x: ir.Value, order: Sequence[int]) -> ir.Value:
    return x if list(order) == sorted(order) else emit.op("Transpose", x, perm=list(order))


@translates(aten.index_put.default)
def _index_put(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """x with values at x[i, j, ...], in the place of what was there or added to it."""
    source, indices, values = given.self, given.indices, given.values
    if any(dtype_of(index) in (torch.bool, torch.uint8) for index in indices if index is not None):
        return _put_where(emit, node, given)
    front, places = _Front(source, indices), _places(emit, indices)
    x, dtype = emit.get(source), dtype_of(node)
    turned = front.turned(emit, x)
    shape = emit.op("Shape", front.back(emit, emit.op("GatherND", turned, places)))
    updates = front.forth(emit, emit.op("Expand", emit.get(values, dtype), shape))
    put = emit.op("ScatterND", turned, places, updates, reduction="add" if given.accumulate else "none")
    return front.restored(emit, put)


def _put_where(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """One value where a mask over the first axes is true."""
    (mask, *others), values = given.indices, given.values
    if any(other is not None for other in others) or mask is None:
        raise unsupported(node, "with a mask and other indices")
    if any(size != 1 for size in shape_of(values)):
        raise unsupported(node, "with a mask and a value for each of its places")
    behind = list(range(len(shape_of(mask)), len(shape_of(given.self))))
    place = emit.get(mask, torch.bool)
    place = emit.op("Unsqueeze", place, emit.constant(behind)) if behind else place
    x, value = emit.get(given.self), emit.get(values, dtype_of(node))
    return emit.op("Where", place, emit.op("Add", x, value) if given.accumulate else value, x)


@translates(aten.masked_scatter.default)
def _masked_scatter(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """The elements of a source, one after the other, where a mask is true."""
    shape = emit.op("Shape", emit.get(given.self))
    mask = emit.op("Expand", emit.get(given.mask, torch.bool), shape)
    flat = emit.op("Reshape", emit.cast(mask, torch.int64), emit.constant([-1]))
    count = emit.op("CumSum", flat, emit.constant(0))
    places = emit.op("Max", emit.op("Sub", count, emit.constant(1)), emit.constant(0))
    values = emit.op("Gather", emit.op("Reshape", emit.get(given.source), emit.constant([-1])), places, axis=0)
    return emit.op("Where", mask, emit.op("Reshape", values, shape), emit.get(given.self))


def _scattered(value_of: str, reduction: str) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        index, dtype = emit.get(given.index, torch.int64), dtype_of(node)
        updates = _updates(emit, node, given, value_of)
        return _scatter(emit, emit.get(given.self, dtype), index, updates, given.dim, reduction)

    return translate


def _scatter(
    emit: Emitter, x: ir.Value, index: ir.Value, updates: ir.Value, axis: int, reduction: str = "none"
) -> ir.Value:
    how = None if reduction == "none" else {"reduction": reduction}
    return emit.op("ScatterElements", x, index, updates, axis=axis, more=how)


def _updates(emit: Emitter, node: Node, given: Arguments, value_of: str) -> ir.Value:
    """What is scattered, in the shape of the index: of a longer source the beginning."""
    source, dtype = getattr(given, value_of), dtype_of(node)
    if not isinstance(source, Node) or not shape_of(source):
        return emit.op("Expand", emit.get(source, dtype), emit.op("Shape", emit.get(given.index)))
    updates = emit.get(source, dtype)
    if shape_of(source) == shape_of(given.index):
        return updates
    rank, shape = len(shape_of(source)), emit.op("Shape", emit.get(given.index))
    return emit.op("Slice", updates, emit.constant([0] * rank), shape, emit.constant(list(range(rank))))


translates(aten.scatter.value)(_scattered("value", "none"))
translates(aten.scatter.src)(_scattered("src", "none"))
translates(aten.scatter_add.default)(_scattered("src", "add"))
_REDUCTIONS = {"sum": "add", "mean": "add", "prod": "mul", "amax": "max", "amin": "min"}


@translates(aten.scatter_reduce.two)
def _scatter_reduce(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype, how, axis = dtype_of(node), given.reduce, given.dim
    if how == "mean" and not dtype.is_floating_point:
        raise unsupported(node, "for means of integers")
    x, index = emit.get(given.self), emit.get(given.index, torch.int64)
    updates, shape = _updates(emit, node, given, "src"), emit.op("Shape", emit.get(given.index))
    if not given.include_self:
        start = emit.op("Expand", emit.constant(_neutral(how, dtype), dtype), shape)
        x = _scatter(emit, x, index, start, axis)
    total = _scatter(emit, x, index, updates, axis, _REDUCTIONS[how])
    if how != "mean":
        return total
    one, zero = emit.constant(1, dtype), emit.constant(0, dtype)
    count = emit.op("Expand", one, emit.op("Shape", x))
    if not given.include_self:
        count = _scatter(emit, count, index, emit.op("Expand", zero, shape), axis)
    count = _scatter(emit, count, index, emit.op("Expand", one, shape), axis, "add")
    return emit.op("Div", total, count)


def _neutral(how: str, dtype: torch.dtype) -> float:
    """What changes nothing in a reduction."""
    if how in ("amax", "amin"):
        range_of = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        return range_of.min if how == "amax" else range_of.max
    return 1 if how == "prod" else 0


@translates(
    aten.embedding_bag.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
)  # fmt: skip
def _embedding_bag(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """Sum, mean or maximum of the rows of a table in each bag; what else the operator returns is of training."""
    dtype, mode = dtype_of(given.weight), ("sum", "mean", "max")[given.mode]
    indices, offsets = emit.get(given.indices, torch.int64), emit.get(given.offsets, torch.int64)
    if given.include_last_offset:
        zero, last = emit.constant([0]), emit.constant([-1])
        offsets = emit.op("Slice", offsets, zero, last, zero)
    length = emit.op("Squeeze", emit.op("Shape", indices), emit.constant([0]))
    places = emit.op("Unsqueeze", emit.op("Range", emit.constant(0), length, emit.constant(1)), emit.constant([1]))
    begun = emit.cast(emit.op("LessOrEqual", offsets, places), torch.int64)
    bags = emit.op("Sub", emit.op("ReduceSum", begun, emit.constant([1]), keepdims=1), emit.constant(1))
    rows, ones = emit.op("Gather", emit.get(given.weight), indices, axis=0), emit.constant(1, dtype)
    if given.per_sample_weights is not None:
        weights = emit.op("Unsqueeze", emit.get(given.per_sample_weights, dtype), emit.constant([1]))
        rows = emit.op("Mul", rows, weights)
    shares = emit.op("Expand", ones, emit.op("Shape", bags))
    nothing = emit.constant(0 if mode != "max" else torch.finfo(dtype).min, dtype)
    padding_row = getattr(given, "padding_idx", None)
    if padding_row is not None and padding_row >= 0:
        padding = emit.op("Equal", emit.op("Unsqueeze", indices, emit.constant([1])), emit.constant(padding_row))
        rows = emit.op("Where", padding, nothing, rows)
        shares = emit.op("Where", padding, emit.constant(0, dtype), shares)
    width = emit.op("Shape", rows, start=1, end=2)
    start = emit.op("Expand", nothing, emit.op("Concat", emit.op("Shape", offsets), width, axis=0))
    made = emit.op("ScatterND", start, bags, rows, reduction="max" if mode == "max" else "add")
    if mode == "sum":
        return (made,)
    number = emit.op("Concat", emit.op("Shape", offsets), emit.constant([1]), axis=0)
    counts = emit.op("Expand", emit.constant(0, dtype), number)
    counts = emit.op("ScatterND", counts, bags, shares, reduction="add")
    if mode == "mean":
        return (emit.op("Div", made, emit.op("Max", counts, ones)),)
    return (emit.op("Where", emit.op("Equal", counts, emit.constant(0, dtype)), emit.constant(0, dtype), made),)
