"""Reshaping, slicing, joining and sizes."""

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.meta import Meta
from ...graph.schema import Arguments
from ...graph.views import END, Item, Operand, Size, Slice
from ..emitter import Emitter, unsupported
from ..registry import translates, translates_complex

aten = torch.ops.aten


@translates(operator.getitem)
def _item(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    item = Item.of(node)
    return emit.results[item.source][item.index]


@translates_complex(aten.sym_size.int)  # whose shape has the axis of the pairs behind its own
@translates(aten.sym_size.int)
def _size(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    source, axis = given.self, given.dim
    dim = shape_of(source)[axis]
    if isinstance(dim, int):
        return emit.constant(dim)
    axis %= len(shape_of(source))
    return emit.op("Squeeze", emit.op("Shape", emit.get(source), start=axis, end=axis + 1), emit.constant([0]))


@translates(aten.sym_numel.default)
def _number(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Size", emit.get(given.self))


@translates(aten.view.default, aten._unsafe_view.default)
def _view(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _reshaped(emit, given.self, given.size)


@translates(aten.reshape.default)
def _reshape(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _reshaped(emit, given.self, given.shape)


def _reshaped(emit: Emitter, source: Node, sizes: Sequence[int | Node]) -> ir.Value:
    """Sizes that are those of the input at the same place become 0 ("keep"), which needs no shape arithmetic."""
    kept = [0 if Size.match(size) == Size(source, axis) else size for axis, size in enumerate(sizes)]
    if sum(isinstance(s, Node) for s in kept) == 1 and -1 not in kept:
        kept = [-1 if isinstance(s, Node) else s for s in kept]
    return emit.op("Reshape", emit.get(source), emit.shape(kept))


@translates(aten.reshape_as.default, aten.view_as.default)
def _reshape_as(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Reshape", emit.get(given.self), emit.op("Shape", emit.get(given.other)))


@translates(aten.flatten.using_ints)
def _flatten(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    source = given.self
    rank = len(shape_of(source))
    start, end = given.start_dim % rank, given.end_dim % rank
    behind = [
        emit.constant([size]) if isinstance(size, int) else emit.op("Shape", emit.get(source), start=axis, end=axis + 1)
        for axis, size in enumerate(shape_of(source)[end + 1 :], end + 1)
    ]
    sizes = [0] * start + [-1]
    shape = emit.op("Concat", emit.constant(sizes), *behind, axis=0) if behind else emit.constant(sizes)
    return emit.op("Reshape", emit.get(source), shape)


@translates(aten.unflatten.int)
def _unflatten(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """One axis becomes several."""
    source, axis = given.self, given.dim % len(shape_of(given.self))
    behind = [
        size if isinstance(size, int) else emit.op("Shape", emit.get(source), start=at, end=at + 1)
        for at, size in enumerate(shape_of(source)[axis + 1 :], axis + 1)
    ]
    parts = [emit.shape([0] * axis + list(given.sizes))]
    parts += [emit.constant([size]) if isinstance(size, int) else size for size in behind]
    return emit.op("Reshape", emit.get(source), emit.op("Concat", *parts, axis=0) if behind else parts[0])


@translates(aten.expand.default, aten.broadcast_to.default)
def _expand(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Expand", emit.get(given.self), emit.shape([1 if s == -1 else s for s in given.size]))


@translates(aten.expand_as.default)
def _expand_as(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Expand", emit.get(given.self), emit.op("Shape", emit.get(given.other)))


@translates(aten.permute.default)
def _permute(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    rank = len(shape_of(node))
    return emit.op("Transpose", emit.get(given.self), perm=[axis % rank for axis in given.dims])


@translates(aten.transpose.int)
def _transpose(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _swapped(emit, given.self, given.dim0, given.dim1)


@translates(aten.t.default)
def _t(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x: Node = given.self
    return _swapped(emit, x, 0, 1) if len(shape_of(x)) > 1 else emit.get(x)


def _swapped(emit: Emitter, x: Node, first: int, second: int) -> ir.Value:
    order = list(range(len(shape_of(x))))
    order[first], order[second] = order[second], order[first]
    return emit.op("Transpose", emit.get(x), perm=order)


@translates(aten.unsqueeze.default)
def _unsqueeze(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Unsqueeze", emit.get(given.self), emit.constant([given.dim]))


@translates(aten.squeeze.default)
def _squeeze_all(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _squeezed(emit, given.self, range(len(shape_of(given.self))))


@translates(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _squeezed(emit, given.self, [given.dim] if isinstance(given.dim, int) else given.dim)


def _squeezed(emit: Emitter, source: Node, axes: Sequence[int]) -> ir.Value:
    """Without those of the axes that have one element; a dynamic one is kept though it may have."""
    sizes = shape_of(source)
    single = [axis for axis in axes if sizes and sizes[axis] == 1]
    return emit.op("Squeeze", emit.get(source), emit.constant(single)) if single else emit.get(source)


@translates(aten.slice.Tensor)
def _slice(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    cut = Slice.of(node)
    if cut.bounds == (0, END) and cut.step == 1:
        return emit.get(cut.x)
    bounds = [emit.shape([bound]) for bound in cut.bounds]
    return emit.op("Slice", emit.get(cut.x), *bounds, emit.constant([cut.dim]), emit.constant([cut.step]))


@translates(aten.cat.default, aten.concat.default)
def _cat(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Concat", *(emit.get(t, dtype_of(node)) for t in given.tensors), axis=given.dim)


@translates(aten.stack.default)
def _stack(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    axis = emit.constant([given.dim])
    parts = [emit.op("Unsqueeze", emit.get(t, dtype_of(node)), axis) for t in given.tensors]
    return emit.op("Concat", *parts, axis=given.dim)


@translates(aten.split_with_sizes.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default)
def _split(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    sizes = [spec.shape[given.dim] for spec in node.meta[Meta.SPEC]]
    if len(sizes) == 1:
        return (emit.get(given.self),)
    known = [size for size in sizes[:-1] if isinstance(size, int)]
    if len(known) < len(sizes) - 1:
        raise unsupported(node, "has several parts of dynamic sizes")
    if isinstance(sizes[-1], int):
        return emit.several(len(sizes), "Split", emit.get(given.self), emit.constant(sizes), axis=given.dim)
    bounds = [0, *accumulate(known), END]
    axis = emit.constant([given.dim])
    return tuple(
        emit.op("Slice", emit.get(given.self), emit.constant([start]), emit.constant([stop]), axis)
        for start, stop in pairwise(bounds)
    )


@translates(aten.unbind.int)
def _unbind(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    parts, axis = len(node.meta[Meta.SPEC]), given.dim
    return tuple(emit.op("Gather", emit.get(given.self), emit.constant(part), axis=axis) for part in range(parts))


@translates(aten.repeat_interleave.self_int)
def _repeat_each(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Every element of an axis several times in a row."""
    if given.dim is None:
        raise unsupported(node, "without an axis")
    source, axis, sizes = given.self, given.dim % len(shape_of(given.self)), shape_of(node)
    known = [size for size in sizes[axis:] if isinstance(size, int)]
    if len(known) < len(sizes) - axis:
        raise unsupported(node, "in front of an axis of unknown size,")
    column = emit.op("Unsqueeze", emit.get(source), emit.constant([axis + 1]))
    beside = emit.op("Concat", *[column] * given.repeats, axis=axis + 1)
    return emit.op("Reshape", beside, emit.constant([0] * axis + known))


@translates(aten.repeat.default)
def _repeat(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _tiled(emit, given.self, given.repeats)


@translates(aten.tile.default)
def _tile(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _tiled(emit, given.self, given.dims)


def _tiled(emit: Emitter, source: Node, times: Sequence[int | Node]) -> ir.Value:
    x, missing = emit.get(source), len(times) - len(shape_of(source))
    if missing > 0:
        x = emit.op("Unsqueeze", x, emit.constant(list(range(missing))))
    return emit.op("Tile", x, emit.shape([*[1] * -missing, *times]))


@translates(aten.copy.default)
def _copy(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _in_place_of(emit, given.self, given.src, dtype_of(node))


@translates(aten.fill.Tensor, aten.fill.Scalar)
def _fill(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _in_place_of(emit, given.self, given.value, dtype_of(node))


def _in_place_of(emit: Emitter, old: Node, new: Operand, dtype: torch.dtype) -> ir.Value:
    """A value in the place of another, with its shape and type."""
    value = emit.get(new, dtype)
    if isinstance(new, Node) and shape_of(old) == shape_of(new):
        return value
    return emit.op("Expand", value, emit.op("Shape", emit.get(old)))


@translates(aten.roll.default)
def _roll(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """The end of an axis in front of its beginning."""
    x: ir.Value = emit.get(given.self)
    one = emit.constant([1])
    if not given.dims:
        x = emit.op("Reshape", x, emit.constant([-1]))
    for shift, axis in zip(given.shifts, given.dims or [0], strict=True):
        if shift:
            border, at = emit.shape([-shift]), emit.constant([axis])
            end = emit.op("Slice", x, border, emit.constant([END]), at, one)
            x = emit.op("Concat", end, emit.op("Slice", x, emit.constant([0]), border, at, one), axis=axis)
    return x if given.dims else emit.op("Reshape", x, emit.op("Shape", emit.get(given.self)))


@translates(aten.select_scatter.default)
def _select_scatter(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """A value in the place of one element of an axis."""
    value, axis = emit.get(given.src, dtype_of(node)), given.dim
    value = emit.op("Unsqueeze", value, emit.constant([axis]))
    return _between(emit, given.self, value, axis, given.index, (given.index + 1) or None)


@translates(aten.slice_scatter.default)
def _slice_scatter(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """A value in the place of a slice of an axis."""
    value = emit.get(given.src, dtype_of(node))
    if given.step != 1:
        size = shape_of(given.self)[given.dim]
        if isinstance(size, str) or isinstance(given.start, Node) or isinstance(given.end, Node):
            raise unsupported(node, f"with a step of {given.step} on an axis whose size is free")
        places = list(range(size))
        for number, place in enumerate(range(*slice(given.start, given.end, given.step).indices(size))):
            places[place] = size + number
        both = emit.op("Concat", emit.get(given.self), value, axis=given.dim)
        return emit.op("Gather", both, emit.constant(places), axis=given.dim)
    return _between(emit, given.self, value, given.dim, given.start, given.end)


def _between(
    emit: Emitter, x: Node, value: ir.Value, axis: int, start: int | Node | None, end: int | Node | None
) -> ir.Value:
    """What is in front of an axis's `start`, a value, and what is behind its `end`."""
    one = emit.constant([1])

    def cut(begin: int | Node, stop: int | Node) -> ir.Value:
        return emit.op("Slice", emit.get(x), emit.shape([begin]), emit.shape([stop]), emit.constant([axis]), one)

    front = [] if start is None or start == 0 else [cut(0, start)]
    behind = [] if end is None or end == END else [cut(end, END)]
    return emit.op("Concat", *front, value, *behind, axis=axis)


@translates(aten.meshgrid.default, aten.meshgrid.indexing)
def _meshgrid(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """Vectors, each along an axis of its own and repeated along the others."""
    order = getattr(given, "indexing", "ij")
    if order != "ij":
        raise unsupported(node, f"with indexing {order!r}")
    values = [emit.get(v) for v in given.tensors]
    shape = emit.op("Concat", *(emit.op("Shape", v) for v in values), axis=0)
    return tuple(
        emit.op(
            "Expand", emit.op("Reshape", v, emit.constant([-1 if i == at else 1 for i in range(len(values))])), shape
        )
        for at, v in enumerate(values)
    )


@translates(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    wide = torch.int64 if dtype in (torch.uint8, torch.int8, torch.bool) else dtype  # which Range has no kernels for
    bounds = [emit.get(bound, wide) for bound in (getattr(given, "start", 0), given.end)]
    made = emit.op("Range", *bounds, emit.constant(getattr(given, "step", 1), wide))
    return made if wide == dtype else emit.cast(made, dtype)
