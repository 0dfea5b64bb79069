"""Convolutions, pooling and batch norms, channels in the second dimension."""

import torch
from torch.fx import Node

from ...passes.convolutions import CONVOLUTIONS
from ...passes.edit import dtype_of, shape_of
from ..emitter import Emitter, unsupported

aten = torch.ops.aten


def _conv(emit: Emitter, node: Node):
    x, weight, bias, stride, padding, dilation, groups = (*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
    rank = len(shape_of(weight)) - 2
    if isinstance(padding, str):
        pads = {"auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[padding]}
        if padding == "same" and set(_each(stride, rank)) != {1}:
            raise unsupported(node, "with padding='same' and a stride")
    else:
        pads = {"pads": _each(padding, rank) * 2}
    name, output = node.meta.get("convolution", ""), node.meta.get("result_of", "")
    return emit.op(
        "Conv", emit.get(x), emit.get(weight), emit.get(bias), name=name, output=output and f"{output}.output",
        strides=_each(stride, rank), dilations=_each(dilation, rank), group=groups, **pads,
    )  # fmt: skip


def _max_pool(rank: int):
    def translate(emit: Emitter, node: Node):
        x, kernel, stride, padding, dilation, ceil = (*node.args, *([], 0, 1, False)[len(node.args) - 2 :])
        kernel = _each(kernel, rank)
        return emit.op(
            "MaxPool", emit.get(x), kernel_shape=kernel, strides=_each(stride, rank) or kernel,
            pads=_each(padding, rank) * 2, dilations=_each(dilation, rank), ceil_mode=int(ceil),
        )  # fmt: skip

    return translate


def _avg_pool(rank: int):
    def translate(emit: Emitter, node: Node):
        x, kernel, stride, padding, ceil, include, divisor = (
            *node.args, *([], 0, False, True, None)[len(node.args) - 2 :], None
        )[:7]  # fmt: skip
        if divisor is not None:
            raise unsupported(node, "with a divisor of its own")
        kernel = _each(kernel, rank)
        return emit.op(
            "AveragePool", emit.get(x), kernel_shape=kernel, strides=_each(stride, rank) or kernel,
            pads=_each(padding, rank) * 2, ceil_mode=int(ceil), count_include_pad=int(include),
        )  # fmt: skip

    return translate


def _adaptive_avg_pool(rank: int):
    def translate(emit: Emitter, node: Node):
        x, wanted = node.args[0], _each(node.args[1], rank)
        sizes = shape_of(x)[-rank:]
        if set(wanted) == {1}:
            return emit.op("ReduceMean", emit.get(x), emit.constant(list(range(-rank, 0))), keepdims=1)
        if not all(isinstance(s, int) and s % w == 0 for s, w in zip(sizes, wanted, strict=True)):
            raise unsupported(node, f"from {list(sizes)} to {wanted}, which are not whole windows,")
        kernel = [s // w for s, w in zip(sizes, wanted, strict=True)]
        return emit.op("AveragePool", emit.get(x), kernel_shape=kernel, strides=kernel)

    return translate


def _batch_norm(emit: Emitter, node: Node):
    x, weight, bias, mean, variance, *rest = node.args
    if node.target is aten.batch_norm.default and rest[0]:
        raise unsupported(node, "in training mode")
    epsilon = rest[2] if node.target is aten.batch_norm.default else rest[1]
    channels, dtype = shape_of(x)[1], dtype_of(x)
    gain = emit.get(weight) if weight is not None else emit.constant([1.0] * channels, dtype)
    shift = emit.get(bias) if bias is not None else emit.constant([0.0] * channels, dtype)
    made = emit.op(
        "BatchNormalization", emit.get(x), gain, shift, emit.get(mean), emit.get(variance), epsilon=float(epsilon)
    )
    return made if node.target is aten.batch_norm.default else (made,)


def _group_norm(emit: Emitter, node: Node):
    x, groups, weight, bias, epsilon = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    channels, rank = shape_of(x)[1], len(shape_of(x))
    # Every group is one row to normalize.
    rows = emit.op("Reshape", emit.get(x), emit.constant([0, groups, -1]))
    ones, zeros = (emit.constant([value] * groups, dtype_of(x)) for value in (1.0, 0.0))
    rows = emit.op("InstanceNormalization", rows, ones, zeros, epsilon=float(epsilon))
    made = emit.op("Reshape", rows, emit.op("Shape", emit.get(x)))
    beside = emit.constant([1, channels, *[1] * (rank - 2)])
    for op_type, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            made = emit.op(op_type, made, emit.op("Reshape", emit.get(parameter), beside))
    return made


def _each(value: int | list[int], rank: int) -> list[int]:
    """One number for every dimension of space, from one for all or a list."""
    if isinstance(value, int):
        return [value] * rank
    return list(value) * rank if len(value) == 1 else list(value)


TRANSLATIONS = {
    **dict.fromkeys(CONVOLUTIONS, _conv),
    aten.conv1d.padding: _conv, aten.conv2d.padding: _conv,
    aten.max_pool1d.default: _max_pool(1), aten.max_pool2d.default: _max_pool(2),
    aten.avg_pool1d.default: _avg_pool(1), aten.avg_pool2d.default: _avg_pool(2),
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool(1), aten.adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    aten.batch_norm.default: _batch_norm, aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.group_norm.default: _group_norm,
}  # fmt: skip
