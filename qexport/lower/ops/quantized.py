"""The quantization operators."""

import torch
from torch.fx import Node

from ...passes.edit import dtype_of, shape_of
from ..emitter import Emitter

ops = torch.ops.qexport


def _dequantize(emit: Emitter, node: Node):
    codes, scale, zero_point, axis, block_size, bits = node.args
    if codes.op == "get_attr":
        x = emit.tensor(codes, bits=bits)
    else:
        x, bits = emit.get(codes), 8
    zero = None if zero_point is None else emit.tensor(zero_point, bits=bits)
    per_tensor = shape_of(scale) == ()
    return emit.op(
        "DequantizeLinear", x, emit.get(scale), zero,
        axis=None if per_tensor else axis, block_size=block_size or None,
    )  # fmt: skip


def _quantize(emit: Emitter, node: Node):
    x, scale, zero_point, signed = node.args
    zero = emit.constant(zero_point, torch.int8 if signed else torch.uint8)
    return emit.op("QuantizeLinear", emit.get(x), emit.get(scale), zero)


def _token_scale(emit: Emitter, node: Node):
    x, qmax = node.args
    dtype = dtype_of(node)
    absmax = emit.op("ReduceMax", emit.op("Abs", emit.get(x)), emit.constant([-1]), keepdims=1)
    scale = emit.op("Mul", absmax, emit.constant(1.0 / qmax, dtype))
    return emit.op("Max", scale, emit.constant(1e-6 if dtype == torch.float16 else 1e-8, dtype))


def _matmul_integer(emit: Emitter, node: Node):
    a, b = node.args
    return emit.op("MatMulInteger", emit.get(a), emit.get(b), name=node.meta.get("linear", ""))


def _widen(emit: Emitter, node: Node):
    return emit.cast(emit.tensor(node.args[0], bits=4), torch.int8)


TRANSLATIONS = {
    ops.dequantize_linear.default: _dequantize,
    ops.quantize_linear.default: _quantize,
    ops.token_scale.default: _token_scale,
    ops.matmul_integer.default: _matmul_integer,
    ops.widen_int4.default: _widen,
    # The kernel does it to its own input: there is no node.
    ops.matmul_nbits_input.default: lambda emit, node: emit.get(node.args[0]),
}
