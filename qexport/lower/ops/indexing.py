"""Picking elements by index, and tensors of one value."""

import torch
from torch.fx import Node

from ...passes.edit import dtype_of, shape_of
from ..emitter import Emitter, unsupported

aten = torch.ops.aten


def _index(emit: Emitter, node: Node):
    """x[i, j, ...] with integer tensors for the first dimensions, or for one of them."""
    source, indices = node.args
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if any(dtype_of(indices[axis]) in (torch.bool, torch.uint8) for axis in axes):
        raise unsupported(node, "with a mask makes a size that depends on values and")
    if len(axes) == 1:
        return emit.op("Gather", emit.get(source), emit.get(indices[axes[0]]), axis=axes[0])
    if axes != list(range(len(axes))):
        raise unsupported(node, "with a whole dimension in front of or between its indices")
    places = [emit.get(indices[axis], torch.int64) for axis in axes]
    nothing = places[0]  # zeros of the shape that all indices have together
    for other in places[1:]:
        nothing = emit.op("Add", nothing, other)
    nothing = emit.op("Sub", nothing, nothing)
    last = emit.constant([-1])
    places = [emit.op("Unsqueeze", emit.op("Add", place, nothing), last) for place in places]
    return emit.op("GatherND", emit.get(source), emit.op("Concat", *places, axis=-1))


def _gather(emit: Emitter, node: Node):
    source, axis, index = node.args[:3]
    return emit.op("GatherElements", emit.get(source), emit.get(index), axis=axis)


def _filled(value_of, shape_argument: int | None):
    """A tensor of one value.

    Args:
        value_of: the value from the node.
        shape_argument: place of the shape among the arguments; None for the shape of the first one.
    """

    def translate(emit: Emitter, node: Node):
        value = emit.get(value_of(node), dtype_of(node))
        if shape_argument is None:
            shape = emit.op("Shape", emit.get(node.args[0]))
        else:
            sizes = node.args[shape_argument]
            if not sizes:
                return value
            shape = emit.shape(sizes)
        return emit.op("Expand", value, shape)

    return translate


def _masked_fill(emit: Emitter, node: Node):
    source, mask, value = node.args
    dtype = dtype_of(node)
    return emit.op("Where", emit.get(mask), emit.get(value, dtype), emit.get(source, dtype))


def _unbind(emit: Emitter, node: Node):
    axis = node.args[1] if len(node.args) > 1 else 0
    parts = range(shape_of(node.args[0])[axis])
    return tuple(emit.op("Gather", emit.get(node.args[0]), emit.constant(part), axis=axis) for part in parts)


def _argument(op_type: str):
    def translate(emit: Emitter, node: Node):
        source, axis, keep = (*node.args, *(None, False)[len(node.args) - 1 :])
        x = emit.get(source, torch.int32 if dtype_of(source) == torch.int64 else None)
        if axis is None:
            x, axis, keep = emit.op("Reshape", x, emit.constant([-1])), 0, False
        return emit.op(op_type, x, axis=axis, keepdims=int(keep))

    return translate


def _cumsum(emit: Emitter, node: Node):
    return emit.op("CumSum", emit.get(node.args[0], dtype_of(node)), emit.constant(node.args[1]))


def _diff(emit: Emitter, node: Node):
    """Every element minus the one before it."""
    x, order, axis, before, after = (*node.args, *(1, -1, None, None)[len(node.args) - 1 :])
    if order != 1:
        raise unsupported(node, f"of order {order}")
    parts = [emit.get(t, dtype_of(node)) for t in (before, x, after) if t is not None]
    whole = emit.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]
    one, axes = emit.constant([1]), emit.constant([axis])
    rest = emit.op("Slice", whole, one, emit.constant([2**63 - 1]), axes, one)
    return emit.op("Sub", rest, emit.op("Slice", whole, emit.constant([0]), emit.constant([-1]), axes, one))


def _stack(emit: Emitter, node: Node):
    axis = emit.constant([node.args[1] if len(node.args) > 1 else 0])
    parts = [emit.op("Unsqueeze", emit.get(t, dtype_of(node)), axis) for t in node.args[0]]
    return emit.op("Concat", *parts, axis=node.args[1] if len(node.args) > 1 else 0)


def _repeat(emit: Emitter, node: Node):
    source, times = node.args
    x, more = emit.get(source), len(times) - len(shape_of(source))
    if more:
        x = emit.op("Unsqueeze", x, emit.constant(list(range(more))))
    return emit.op("Tile", x, emit.shape(times))


def _pad(emit: Emitter, node: Node):
    source, pads = node.args[:2]
    given = node.args[2:]
    if given and not isinstance(given[0], str):  # constant_pad_nd
        given = ("constant", *given)
    mode, value = (*given, *("constant", None)[len(given) :])
    rank = len(shape_of(source))
    if mode not in ("constant", "reflect"):
        raise unsupported(node, f"with mode {mode!r}")
    begin, end = [0] * rank, [0] * rank
    for place in range(len(pads) // 2):  # pairs for the last dimension, the one before it, and so on
        begin[rank - 1 - place], end[rank - 1 - place] = pads[2 * place : 2 * place + 2]
    fill = emit.constant(value or 0.0, dtype_of(node)) if mode == "constant" else None
    return emit.op("Pad", emit.get(source), emit.shape([*begin, *end]), fill, mode=mode)


TRANSLATIONS = {
    aten.index.Tensor: _index, aten.gather.default: _gather,
    aten.new_ones.default: _filled(lambda node: 1, 1), aten.new_zeros.default: _filled(lambda node: 0, 1),
    aten.new_full.default: _filled(lambda node: node.args[2], 1),
    aten.ones.default: _filled(lambda node: 1, 0), aten.zeros.default: _filled(lambda node: 0, 0),
    aten.full.default: _filled(lambda node: node.args[1], 0),
    aten.ones_like.default: _filled(lambda node: 1, None), aten.zeros_like.default: _filled(lambda node: 0, None),
    aten.full_like.default: _filled(lambda node: node.args[1], None),
    aten.masked_fill.Scalar: _masked_fill, aten.masked_fill.Tensor: _masked_fill,
    aten.unbind.int: _unbind, aten.argmax.default: _argument("ArgMax"), aten.argmin.default: _argument("ArgMin"),
    aten.cumsum.default: _cumsum, aten.stack.default: _stack, aten.repeat.default: _repeat,
    aten.diff.default: _diff, aten.pad.default: _pad, aten.constant_pad_nd.default: _pad,
}  # fmt: skip
