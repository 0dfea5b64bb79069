"""Elements of an axis in another order or more than once: turned round, along a diagonal, in windows, by strides."""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import shape_of
from ...graph.schema import Arguments
from ..emitter import Emitter, unsupported
from ..registry import translates

aten = torch.ops.aten


@translates(aten.flip.default)
def _flip(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x: ir.Value = emit.get(given.self)
    axes = list(given.dims)
    if not axes:
        return x
    last, front, back = ([number] * len(axes) for number in (-1, -(2**63), -1))
    return emit.op("Slice", x, *map(emit.constant, (last, front, axes, back)))


@translates(aten.diagonal.default, aten.diagonal_copy.default)
def _diagonal(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Of two axes of known size; the diagonal comes last."""
    x, rank = given.self, len(shape_of(given.self))
    first, second = given.dim1 % rank, given.dim2 % rank
    rows, columns, offset = shape_of(x)[first], shape_of(x)[second], given.offset
    if not isinstance(rows, int) or not isinstance(columns, int):
        raise unsupported(node, "of an axis of unknown size")
    places = [r * columns + r + offset for r in range(rows) if 0 <= r + offset < columns]
    others = [axis for axis in range(rank) if axis not in (first, second)]
    turned = emit.op("Transpose", emit.get(x), perm=[*others, first, second])
    flat = emit.op("Reshape", turned, emit.constant([0] * len(others) + [-1]))
    return emit.op("Gather", flat, emit.constant(places), axis=-1)


@translates(aten.unfold.default)
def _unfold(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Windows of an axis, which come last."""
    x, rank = emit.get(given.self), len(shape_of(given.self))
    if not rank:
        return emit.op("Unsqueeze", x, emit.constant([0]))
    axis, size, step = given.dimension % rank, given.size, given.step
    length = shape_of(given.self)[axis]
    inside = emit.constant(list(range(size)))
    if isinstance(length, int):
        begins: ir.Value = emit.constant([[start] for start in range(0, length - size + 1, step)])
    else:
        count = emit.op("Squeeze", emit.op("Shape", x, start=axis, end=axis + 1), emit.constant([0]))
        end = emit.op("Sub", count, emit.constant(size - 1))
        begins = emit.op("Unsqueeze", emit.op("Range", emit.constant(0), end, emit.constant(step)), emit.constant([1]))
    windows = emit.op("Gather", x, emit.op("Add", begins, inside), axis=axis)
    if axis == rank - 1:
        return windows
    return emit.op("Transpose", windows, perm=[*range(axis + 1), *range(axis + 2, rank + 1), axis + 1])


@translates(aten.as_strided.default, aten.as_strided_copy.default)
def _as_strided(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Elements of a contiguous tensor by their places in memory."""
    flat = emit.op("Reshape", emit.get(given.self), emit.constant([-1]))
    places: ir.Value = emit.get(given.storage_offset or 0)
    if not given.size:
        return emit.op("Gather", flat, places, axis=0)
    for size, stride in zip(given.size, given.stride, strict=True):
        steps = emit.op("Range", emit.constant(0), emit.get(size), emit.constant(1))
        steps = emit.op("Mul", steps, emit.get(stride))
        places = emit.op("Add", emit.op("Unsqueeze", places, emit.constant([-1])), steps)
    return emit.op("Gather", flat, places, axis=0)


@translates(aten.col2im.default)
def _col2im(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x, single = emit.get(given.self), len(shape_of(given.self)) == 2
    x = emit.op("Unsqueeze", x, emit.constant([0])) if single else x
    made = emit.op(
        "Col2Im", x, emit.shape(given.output_size), emit.constant(list(given.kernel_size)),
        dilations=_pair(given.dilation), pads=_pair(given.padding) * 2, strides=_pair(given.stride),
    )  # fmt: skip
    return emit.op("Squeeze", made, emit.constant([0])) if single else made


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * (2 if len(values) == 1 else 1)
