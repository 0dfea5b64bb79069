"""Convolutions, pooling and batch norms, channels in the second dimension."""

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.convolution_sites import CONVOLUTIONS, zero_padding
from ...graph.edit import dtype_of, shape_of
from ...graph.meta import Meta
from ...graph.schema import Arguments, bind
from ...graph.views import DequantizeLinear, size_at, sizes_of
from ..emitter import Attribute, Emitter, unsupported
from ..registry import Translation, translates

aten = torch.ops.aten

_SHORT = 32  # a sequence of fewer is done in microseconds, as another node is


@translates(*CONVOLUTIONS, aten.conv1d.padding, aten.conv2d.padding)
def _conv(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    rank = len(shape_of(given.weight)) - 2
    x, strides = given.input, _each(given.stride, rank)
    pads: dict[str, Attribute]
    if isinstance(given.padding, str):
        value = emit.get(x)
        pads = {"auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[given.padding]}
        if given.padding == "same" and set(strides) != {1}:
            raise unsupported(node, "with padding='same' and a stride")
    else:
        own, more = _each(given.padding, rank) * 2, [0] * 2 * rank
        if (added := zero_padding(x, rank)) is not None:  # its Pad is dropped if nothing else reads it
            x, more = bind(x).self, [*added[0], *added[1]]
        value = emit.get(x)
        whole = [a + b for a, b in zip(own, more, strict=True)]
        if _slow_with_padding(x, given.weight, whole):
            value, whole = _zeros_in_front(emit, value, whole), [0] * 2 * rank
        pads = {"pads": whole}
    name, output = node.meta.get(Meta.CONVOLUTION, ""), node.meta.get(Meta.RESULT_OF, "")
    return emit.op(
        "Conv", value, emit.get(given.weight), emit.get(given.bias), name=name,
        output=output and f"{output}.output", strides=strides, dilations=_each(given.dilation, rank),
        group=given.groups, more=pads,
    )  # fmt: skip


def _slow_with_padding(x: Node, weight: Node, pads: Sequence[int]) -> bool:
    """Whether another node had better add the zeros, on the CPU: to a sequence as an image of width 1, in float32.

    Its blocked kernels take rows of width 1 as one long row, but one output at a time where they pad themselves: 1.2 to
    3 times as long. Of sequences shorter than half the kernel they save more by leaving the zeros out.
    """
    sizes, kernel = shape_of(x)[2:], sizes_of(weight)[2:]
    if len(kernel) != 2 or sizes[1] != 1 or kernel[1] != 1 or not any(pads):
        return False
    if dtype_of(x) != torch.float32 or DequantizeLinear.match(x) is not None:
        return False
    return not isinstance(sizes[0], int) or sizes[0] >= max(_SHORT, kernel[0] // 2)


def _zeros_in_front(emit: Emitter, x: ir.Value, pads: Sequence[int]) -> ir.Value:
    """A Pad that stays: ONNX Runtime folds one into the convolution behind it, unless it names its axes."""
    rank = len(pads) // 2
    return emit.op("Pad", x, emit.constant(list(pads)), None, emit.constant(list(range(2, 2 + rank))))


def _transposed_conv(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    rank = len(shape_of(given.weight)) - 2
    return emit.op(
        "ConvTranspose", emit.get(given.input), emit.get(given.weight), emit.get(given.bias),
        strides=_each(given.stride, rank), pads=_each(given.padding, rank) * 2,
        dilations=_each(given.dilation, rank), output_padding=_each(given.output_padding, rank), group=given.groups,
    )  # fmt: skip


translates(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)(_transposed_conv)


@translates(aten.convolution.default)
def _convolution(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return (_transposed_conv if given.transposed else _conv)(emit, node, given)


def _rows(emit: Emitter, x: Node, rank: int) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
    """A value with a batch in front, which ONNX pools alone; and what takes it off a result where there was none."""
    value, first = emit.get(x), emit.constant([0])
    if len(shape_of(x)) > rank + 1:
        return value, lambda pooled: pooled
    return emit.op("Unsqueeze", value, first), lambda pooled: emit.op("Squeeze", pooled, first)


def _max_pool(rank: int) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        kernel, (x, taken_off) = _each(given.kernel_size, rank), _rows(emit, given.self, rank)
        return taken_off(emit.op(
            "MaxPool", x, kernel_shape=kernel, strides=_each(given.stride, rank) or kernel,
            pads=_each(given.padding, rank) * 2, dilations=_each(given.dilation, rank),
            ceil_mode=int(given.ceil_mode),
        ))  # fmt: skip

    return translate


translates(aten.max_pool1d.default)(_max_pool(1))
translates(aten.max_pool2d.default)(_max_pool(2))
translates(aten.max_pool3d.default)(_max_pool(3))


def _max_pool_with_indices(rank: int) -> Translation:
    """The largest of every window, and where it is in its plane; ONNX counts through the whole tensor."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
        kernel, (x, taken_off) = _each(given.kernel_size, rank), _rows(emit, given.self, rank)
        largest, places = emit.several(
            2, "MaxPool", x, kernel_shape=kernel, strides=_each(given.stride, rank) or kernel,
            pads=_each(given.padding, rank) * 2, dilations=_each(given.dilation, rank),
            ceil_mode=int(given.ceil_mode),
        )  # fmt: skip
        plane = emit.op("ReduceProd", emit.op("Shape", x, start=-rank), keepdims=0)
        return taken_off(largest), taken_off(emit.op("Mod", places, plane))

    return translate


translates(aten.max_pool2d_with_indices.default)(_max_pool_with_indices(2))
translates(aten.max_pool3d_with_indices.default)(_max_pool_with_indices(3))


def _avg_pool(rank: int) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        kernel, divisor = _each(given.kernel_size, rank), getattr(given, "divisor_override", None)
        if divisor is not None and given.ceil_mode:
            raise unsupported(node, "with a divisor of its own and sizes that are rounded up")
        x, taken_off = _rows(emit, given.self, rank)
        mean = taken_off(emit.op(
            "AveragePool", x, kernel_shape=kernel, strides=_each(given.stride, rank) or kernel,
            pads=_each(given.padding, rank) * 2, ceil_mode=int(given.ceil_mode),
            count_include_pad=int(given.count_include_pad or divisor is not None),
        ))  # fmt: skip
        if divisor is None:
            return mean
        return emit.op("Mul", mean, emit.constant(math.prod(kernel) / divisor, dtype_of(node)))

    return translate


translates(aten.avg_pool1d.default)(_avg_pool(1))
translates(aten.avg_pool2d.default)(_avg_pool(2))
translates(aten.avg_pool3d.default)(_avg_pool(3))


def _adaptive_avg_pool(rank: int) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        x, wanted = given.self, _each(given.output_size, rank)
        sizes = shape_of(x)[-rank:]
        if set(wanted) == {1}:
            return emit.op("ReduceMean", emit.get(x), emit.constant(list(range(-rank, 0))), keepdims=1)
        kernel = [s // w for s, w in zip(sizes, wanted, strict=True) if isinstance(s, int) and s % w == 0]
        if len(kernel) < rank:
            return _uneven_means(emit, node, x, wanted)
        value, taken_off = _rows(emit, x, rank)
        return taken_off(emit.op("AveragePool", value, kernel_shape=kernel, strides=kernel))

    return translate


translates(aten.adaptive_avg_pool1d.default)(_adaptive_avg_pool(1))
translates(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)(_adaptive_avg_pool(2))
translates(aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default)(_adaptive_avg_pool(3))


def _uneven_means(emit: Emitter, node: Node, x: Node, wanted: Sequence[int]) -> ir.Value:
    """Windows of different size: one axis after the other is a product with what each element gives each window."""
    sizes, value, dtype = shape_of(x)[-len(wanted) :], emit.get(x), dtype_of(node)
    rank = len(shape_of(x))
    for axis, (size, windows) in enumerate(zip(sizes, wanted, strict=True), rank - len(wanted)):
        if not isinstance(size, int):
            raise unsupported(node, f"from an unknown size to {windows}")
        shares = torch.nn.functional.adaptive_avg_pool1d(torch.eye(size), windows)  # [size, windows]
        order = [*range(axis), *range(axis + 1, rank), axis]
        value = emit.op("MatMul", emit.op("Transpose", value, perm=order), emit.constant(shares.tolist(), dtype))
        value = emit.op("Transpose", value, perm=[*range(axis), rank - 1, *range(axis, rank - 1)])
    return value


@translates(aten.batch_norm.default)
def _batch_norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if given.training:
        raise unsupported(node, "in training mode")
    return _normalized(emit, given)


@translates(aten._native_batch_norm_legit_no_training.default)
def _native_batch_norm(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return (_normalized(emit, given),)  # the others are of training


def _normalized(emit: Emitter, given: Arguments) -> ir.Value:
    x, dtype, channels = given.input, dtype_of(given.input), size_at(given.input, 1)
    gain = emit.get(given.weight) if given.weight is not None else emit.constant([1.0] * channels, dtype)
    shift = emit.get(given.bias) if given.bias is not None else emit.constant([0.0] * channels, dtype)
    return emit.op(
        "BatchNormalization", emit.get(x), gain, shift, emit.get(given.running_mean), emit.get(given.running_var),
        epsilon=float(given.eps),
    )  # fmt: skip


@translates(aten.native_group_norm.default)
def _native_group_norm(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return (_normalized_groups(emit, given, given.group),)  # the others are of training


@translates(aten.group_norm.default)
def _group_norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return _normalized_groups(emit, given, given.num_groups)


def _normalized_groups(emit: Emitter, given: Arguments, groups: int) -> ir.Value:
    x = given.input
    # Every group is one row to normalize.
    rows = emit.op("Reshape", emit.get(x), emit.constant([0, groups, -1]))
    ones, zeros = (emit.constant([value] * groups, dtype_of(x)) for value in (1.0, 0.0))
    rows = emit.op("InstanceNormalization", rows, ones, zeros, epsilon=float(given.eps))
    made = emit.op("Reshape", rows, emit.op("Shape", emit.get(x)))
    beside = emit.constant([1, size_at(x, 1), *[1] * (len(shape_of(x)) - 2)])
    for op_type, parameter in (("Mul", given.weight), ("Add", given.bias)):
        if parameter is not None:
            made = emit.op(op_type, made, emit.op("Reshape", emit.get(parameter), beside))
    return made


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    """One number for every dimension of space, from one for all or a list."""
    if isinstance(value, int):
        return [value] * rank
    return list(value) * rank if len(value) == 1 else list(value)
