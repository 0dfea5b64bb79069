"""Picking elements by index, tensors of one value, and what is counted along an axis."""

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ...graph.views import END, Operand
from ..emitter import Emitter, unsupported
from ..registry import Translation, translates

aten = torch.ops.aten
_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@translates(aten.select.int, aten.index_select.default)
def _select(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Gather", emit.get(given.self), emit.get(given.index), axis=given.dim)


@translates(aten.embedding.default)
def _embedding(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("Gather", emit.get(given.weight), emit.get(given.indices), axis=0)


@translates(aten.gather.default)
def _gather(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("GatherElements", emit.get(given.self), emit.get(given.index), axis=given.dim)


def _filled(value_of: Callable[[Arguments], Operand]) -> Translation:
    """A tensor of one value, of the given size."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        value = emit.get(value_of(given), dtype_of(node))
        return emit.op("Expand", value, emit.shape(given.size)) if given.size else value

    return translate


def _filled_like(value_of: Callable[[Arguments], Operand]) -> Translation:
    """A tensor of one value, of the size of another."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        value = emit.get(value_of(given), dtype_of(node))
        return emit.op("Expand", value, emit.op("Shape", emit.get(given.self)))

    return translate


translates(aten.ones.default, aten.new_ones.default)(_filled(lambda _: 1))
translates(aten.zeros.default, aten.new_zeros.default)(_filled(lambda _: 0))
translates(aten.full.default, aten.new_full.default)(_filled(lambda given: given.fill_value))
translates(aten.empty.memory_format, aten.empty_permuted.default, aten.empty_strided.default)(_filled(lambda _: 0))
translates(aten.empty_like.default)(_filled_like(lambda _: 0))
translates(aten.ones_like.default)(_filled_like(lambda _: 1))
translates(aten.zeros_like.default)(_filled_like(lambda _: 0))
translates(aten.full_like.default)(_filled_like(lambda given: given.fill_value))


@translates(aten.scalar_tensor.default)
def _scalar_tensor(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    value: ir.Value = emit.get(given.s, dtype_of(node))
    return value


@translates(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    return emit.op("Where", emit.get(given.mask), emit.get(given.value, dtype), emit.get(given.self, dtype))


def narrowed(emit: Emitter, source: Node) -> ir.Value:
    """A value as ArgMin has kernels for it, which is int32 for int64."""
    return emit.get(source, torch.int32 if dtype_of(source) == torch.int64 else None)


def _argument(op_type: str) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        axis, keep = given.dim, given.keepdim
        x = narrowed(emit, given.self)
        if axis is None:
            x, axis, keep = emit.op("Reshape", x, emit.constant([-1])), 0, False
        return emit.op(op_type, x, axis=axis, keepdims=int(keep))

    return translate


translates(aten.argmax.default)(_argument("ArgMax"))
translates(aten.argmin.default)(_argument("ArgMin"))


@translates(aten.cumsum.default)
def _cumsum(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x: ir.Value = emit.get(given.self, dtype_of(node))
    return emit.op("CumSum", x, emit.constant(given.dim)) if shape_of(node) else x


@translates(aten.diff.default)
def _diff(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Every element minus the one before it."""
    if given.n != 1:
        raise unsupported(node, f"of order {given.n}")
    parts = [emit.get(t, dtype_of(node)) for t in (given.prepend, given.self, given.append) if t is not None]
    whole = emit.op("Concat", *parts, axis=given.dim) if len(parts) > 1 else parts[0]
    one, axes = emit.constant([1]), emit.constant([given.dim])
    rest = emit.op("Slice", whole, one, emit.constant([END]), axes, one)
    return emit.op("Sub", rest, emit.op("Slice", whole, emit.constant([0]), emit.constant([-1]), axes, one))


@translates(aten.pad.default)
def _pad(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _padded(emit, node, given.self, given.pad, given.mode, given.value)


@translates(aten.constant_pad_nd.default)
def _constant_pad(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _padded(emit, node, given.self, given.pad, "constant", given.value)


def _mode_of(mode: str) -> Translation:
    return lambda emit, node, given: _padded(emit, node, given.self, given.padding, mode, None)


translates(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)(
    _mode_of("reflect")
)
translates(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)(
    _mode_of("replicate")
)


def _padded(
    emit: Emitter, node: Node, source: Node, pads: Sequence[int | Node], mode: str, value: Operand | None
) -> ir.Value:
    rank = len(shape_of(source))
    if mode not in _MODES:
        raise unsupported(node, f"with mode {mode!r}")
    begin: list[int | Node] = [0] * rank
    end: list[int | Node] = [0] * rank
    for place in range(len(pads) // 2):  # pairs for the last dimension, the one before it, and so on
        begin[rank - 1 - place], end[rank - 1 - place] = pads[2 * place : 2 * place + 2]
    fill = emit.get(value or 0.0, dtype_of(node)) if mode == "constant" else None
    return emit.op("Pad", emit.get(source), emit.shape([*begin, *end]), fill, mode=_MODES[mode])
