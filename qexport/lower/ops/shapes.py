"""Reshaping, slicing, joining, indexing and sizes."""

import operator

import torch
from torch.fx import Node

from ...passes.edit import dtype_of, is_call, shape_of
from ..emitter import Emitter, unsupported

aten = torch.ops.aten
_END = 2**63 - 1


def _size(emit: Emitter, node: Node):
    source, axis = node.args
    dim = shape_of(source)[axis]
    if isinstance(dim, int):
        return emit.constant(dim)
    axis %= len(shape_of(source))
    return emit.op("Squeeze", emit.op("Shape", emit.get(source), start=axis, end=axis + 1), emit.constant([0]))


def _reshape(emit: Emitter, node: Node):
    """Sizes that are those of the input at the same place become 0 ("keep"), which needs no shape arithmetic."""
    source, sizes = node.args[0], list(node.args[1])
    kept = [
        0 if is_call(s, aten.sym_size.int) and s.args[0] is source and s.args[1] == axis else s
        for axis, s in enumerate(sizes)
    ]
    if sum(isinstance(s, Node) for s in kept) == 1 and -1 not in kept:
        kept = [-1 if isinstance(s, Node) else s for s in kept]
    return emit.op("Reshape", emit.get(source), emit.shape(kept))


def _expand(emit: Emitter, node: Node):
    return emit.op("Expand", emit.get(node.args[0]), emit.shape([1 if s == -1 else s for s in node.args[1]]))


def _transpose(emit: Emitter, node: Node):
    order = list(range(len(shape_of(node))))
    if is_call(node, aten.permute.default):
        order = [axis % len(order) for axis in node.args[1]]
    else:
        first, second = (0, 1) if is_call(node, aten.t.default) else node.args[1:3]
        order[first], order[second] = order[second], order[first]
    return emit.op("Transpose", emit.get(node.args[0]), perm=order)


def _unsqueeze(emit: Emitter, node: Node):
    return emit.op("Unsqueeze", emit.get(node.args[0]), emit.constant([node.args[1]]))


def _squeeze(emit: Emitter, node: Node):
    axes = node.args[1] if len(node.args) > 1 else None
    axes = None if axes is None else emit.constant([axes] if isinstance(axes, int) else list(axes))
    return emit.op("Squeeze", emit.get(node.args[0]), axes)


def _slice(emit: Emitter, node: Node):
    source, axis, start, end, step = (*node.args, *(0, 0, _END, 1)[len(node.args) - 1 :])
    start, end = 0 if start is None else start, _END if end is None else end
    if (start, end, step) == (0, _END, 1):
        return emit.get(source)
    bounds = [emit.shape([bound]) for bound in (start, end)]
    return emit.op("Slice", emit.get(source), *bounds, emit.constant([axis]), emit.constant([step]))


def _select(emit: Emitter, node: Node):
    return emit.op("Gather", emit.get(node.args[0]), emit.get(node.args[2]), axis=node.args[1])


def _index_select(emit: Emitter, node: Node):
    source, axis, index = node.args
    return emit.op("Gather", emit.get(source), emit.get(index), axis=axis)


def _index(emit: Emitter, node: Node):
    """x[:, :, ids] and the like: one axis is indexed."""
    source, indices = node.args
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or dtype_of(given[0][1]) == torch.bool:
        raise unsupported(node, "by several indices at once, or by a mask,")
    ((axis, index),) = given
    return emit.op("Gather", emit.get(source), emit.get(index), axis=axis)


def _repeat_each(emit: Emitter, node: Node):
    """Every element of an axis several times in a row."""
    source, times, axis = node.args[:3]
    rank, sizes = len(shape_of(source)), shape_of(node)
    axis %= rank
    if not all(isinstance(size, int) for size in sizes[axis:]):
        raise unsupported(node, "in front of an axis of unknown size,")
    column = emit.op("Unsqueeze", emit.get(source), emit.constant([axis + 1]))
    beside = emit.op("Concat", *[column] * times, axis=axis + 1)
    return emit.op("Reshape", beside, emit.constant([0] * axis + list(sizes[axis:])))


def _repeat(emit: Emitter, node: Node):
    source, times = node.args
    x, missing = emit.get(source), len(times) - len(shape_of(source))
    times = [1] * -missing + list(times)
    if missing > 0:
        x = emit.op("Unsqueeze", x, emit.constant(list(range(missing))))
    return emit.op("Tile", x, emit.shape(times))


def _full(emit: Emitter, node: Node):
    sizes, value = node.args[:2]
    filled = emit.get(value, dtype_of(node))
    return emit.op("Expand", filled, emit.shape(list(sizes))) if sizes else filled


def _full_like(emit: Emitter, node: Node):
    value = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(node.target)
    value = node.args[1] if value is None else value
    return emit.op("Expand", emit.get(value, dtype_of(node)), emit.op("Shape", emit.get(node.args[0])))


def _zeros(emit: Emitter, node: Node):
    return emit.op("Expand", emit.constant(0, dtype_of(node)), emit.shape(list(node.args[0])))


def _scatter(emit: Emitter, node: Node):
    x, axis, index, source = node.args
    if is_call(node, aten.scatter.value):
        value = emit.get(source, dtype_of(node))
        updates = emit.op("Expand", value, emit.op("Shape", emit.get(index)))
    else:
        updates = emit.get(source)
    return emit.op("ScatterElements", emit.get(x), emit.get(index), updates, axis=axis)


def _gather(emit: Emitter, node: Node):
    x, axis, index = node.args[:3]
    return emit.op("GatherElements", emit.get(x), emit.get(index), axis=axis)


def _stack(emit: Emitter, node: Node):
    axis = node.args[1] if len(node.args) > 1 else 0
    axis %= len(shape_of(node))
    parts = [emit.op("Unsqueeze", emit.get(t, dtype_of(node)), emit.constant([axis])) for t in node.args[0]]
    return emit.op("Concat", *parts, axis=axis)


def _cat(emit: Emitter, node: Node):
    axis = node.args[1] if len(node.args) > 1 else 0
    return emit.op("Concat", *(emit.get(t, dtype_of(node)) for t in node.args[0]), axis=axis)


def _split(emit: Emitter, node: Node):
    axis = node.args[2] if len(node.args) > 2 else 0
    sizes = [spec.shape[axis] for spec in node.meta["spec"]]
    made = emit.op("Split", emit.get(node.args[0]), emit.constant(sizes), axis=axis, outputs=len(sizes))
    return made if isinstance(made, tuple) else (made,)


def _embedding(emit: Emitter, node: Node):
    return emit.op("Gather", emit.get(node.args[0]), emit.get(node.args[1]), axis=0)


def _flatten(emit: Emitter, node: Node):
    source = node.args[0]
    rank = len(shape_of(source))
    start, end = (axis % rank for axis in (*node.args[1:], *(0, -1)[len(node.args) - 1 :]))
    behind = [
        emit.constant([size]) if isinstance(size, int) else emit.op("Shape", emit.get(source), start=axis, end=axis + 1)
        for axis, size in enumerate(shape_of(source)[end + 1 :], end + 1)
    ]
    sizes = [0] * start + [-1]
    shape = emit.op("Concat", emit.constant(sizes), *behind, axis=0) if behind else emit.constant(sizes)
    return emit.op("Reshape", emit.get(source), shape)


def _unflatten(emit: Emitter, node: Node):
    """One axis becomes several."""
    source, axis, sizes = node.args
    rank = len(shape_of(source))
    axis %= rank
    behind = [
        size if isinstance(size, int) else emit.op("Shape", emit.get(source), start=at, end=at + 1)
        for at, size in enumerate(shape_of(source)[axis + 1 :], axis + 1)
    ]
    parts = [emit.shape([0] * axis + list(sizes)), *(emit.constant([s]) if isinstance(s, int) else s for s in behind)]
    return emit.op("Reshape", emit.get(source), emit.op("Concat", *parts, axis=0) if behind else parts[0])


def _expand_as(emit: Emitter, node: Node):
    return emit.op("Expand", emit.get(node.args[0]), emit.op("Shape", emit.get(node.args[1])))


def _reshape_as(emit: Emitter, node: Node):
    return emit.op("Reshape", emit.get(node.args[0]), emit.op("Shape", emit.get(node.args[1])))


def _copy(emit: Emitter, node: Node):
    """A value in the place of another, with its shape and type."""
    old, new = node.args[:2]
    value = emit.get(new, dtype_of(node))
    return (
        value
        if isinstance(new, Node) and shape_of(old) == shape_of(new)
        else emit.op("Expand", value, emit.op("Shape", emit.get(old)))
    )


def _roll(emit: Emitter, node: Node):
    """The end of an axis in front of its beginning."""
    x, one = emit.get(node.args[0]), emit.constant([1])
    axes = node.args[2] if len(node.args) > 2 else ()
    if len(axes) != len(node.args[1]):
        raise unsupported(node, "without axes")
    for shift, axis in zip(node.args[1], axes, strict=True):
        if shift:
            border, at = emit.shape([-shift]), emit.constant([axis])
            end = emit.op("Slice", x, border, emit.constant([_END]), at, one)
            x = emit.op("Concat", end, emit.op("Slice", x, emit.constant([0]), border, at, one), axis=axis)
    return x


def _scatter_part(emit: Emitter, node: Node):
    """A value in the place of a slice, or of one element, of an axis."""
    x, part, axis, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])[:6]
    value, one = emit.get(part, dtype_of(node)), emit.constant([1])
    if is_call(node, aten.select_scatter.default):
        value, end = emit.op("Unsqueeze", value, emit.constant([axis])), (start + 1) or None
    elif step != 1:
        raise unsupported(node, f"with a step of {step}")
    sides = [(0, start)] if start not in (0, None) else []
    behind = [(end, _END)] if end not in (_END, None) else []

    def cut(bounds):
        return emit.op("Slice", emit.get(x), *(emit.shape([b]) for b in bounds), emit.constant([axis]), one)

    return emit.op("Concat", *map(cut, sides), value, *map(cut, behind), axis=axis)


def _meshgrid(emit: Emitter, node: Node):
    """Vectors, each along an axis of its own and repeated along the others."""
    vectors, order = node.args[0], node.kwargs.get("indexing", node.args[1] if len(node.args) > 1 else "ij")
    if order != "ij":
        raise unsupported(node, f"with indexing {order!r}")
    values = [emit.get(v) for v in vectors]
    shape = emit.op("Concat", *(emit.op("Shape", v) for v in values), axis=0)
    return tuple(
        emit.op(
            "Expand", emit.op("Reshape", v, emit.constant([-1 if i == at else 1 for i in range(len(values))])), shape
        )
        for at, v in enumerate(values)
    )


def _arange(emit: Emitter, node: Node):
    bounds = {1: (0, *node.args), 2: node.args}.get(len(node.args), node.args[:2])
    dtype = dtype_of(node)
    step = node.args[2] if is_call(node, aten.arange.start_step) and len(node.args) > 2 else 1
    return emit.op("Range", *(emit.get(b, dtype) for b in bounds), emit.constant(step, dtype))


TRANSLATIONS = {
    aten.sym_size.int: _size,
    aten.view.default: _reshape, aten.reshape.default: _reshape, aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _flatten, aten.expand.default: _expand,
    aten.transpose.int: _transpose, aten.permute.default: _transpose, aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze, aten.squeeze.dim: _squeeze, aten.squeeze.default: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice, aten.select.int: _select, aten.index_select.default: _index_select,
    aten.cat.default: _cat, aten.concat.default: _cat,
    aten.split_with_sizes.default: _split, aten.split.Tensor: _split, aten.chunk.default: _split,
    aten.split.sizes: _split,
    aten.embedding.default: _embedding,
    aten.arange.default: _arange, aten.arange.start: _arange,
    aten.arange.start_step: _arange, aten.index.Tensor: _index, aten.repeat_interleave.self_int: _repeat_each,
    aten.repeat.default: _repeat, aten.full.default: _full,
    aten.full_like.default: _full_like, aten.zeros_like.default: _full_like, aten.ones_like.default: _full_like,
    aten.zeros.default: _zeros, aten.scatter.value: _scatter, aten.scatter.src: _scatter,
    aten.gather.default: _gather, aten.stack.default: _stack, aten.broadcast_to.default: _expand,
    aten.unflatten.int: _unflatten, aten.reshape_as.default: _reshape_as, aten.view_as.default: _reshape_as,
    aten.expand_as.default: _expand_as, aten.roll.default: _roll,
    aten.copy.default: _copy, aten.fill.Tensor: _copy,
    aten.fill.Scalar: _copy,
    aten.select_scatter.default: _scatter_part, aten.slice_scatter.default: _scatter_part, aten.tile.default: _repeat,
    aten.meshgrid.indexing: _meshgrid, aten.meshgrid.default: _meshgrid,
    operator.getitem: lambda emit, node: emit.values[node.args[0]][node.args[1]],
}  # fmt: skip
