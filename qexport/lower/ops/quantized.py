"""The quantization operators."""

import math

import torch
from torch.fx import Node

from ...numerics.expand import channel_scale, expand
from ...numerics.packing import pack_high_first, pack_rows
from ...passes.edit import dtype_of, is_call, shape_of
from ..emitter import Emitter

ops = torch.ops.qexport
_QUANT_TYPE = {"fp4": 0, "nf4": 1}


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
    x, qmax, power = (*node.args, 1.0)[:3]
    dtype = dtype_of(node)
    absmax = emit.op("ReduceMax", emit.op("Abs", emit.get(x)), emit.constant([-1]), keepdims=1)
    if power != 1:
        absmax = emit.op("Pow", absmax, emit.constant(power, dtype))
    scale = emit.op("Mul", absmax, emit.constant(1.0 / qmax, dtype))
    return emit.op("Max", scale, emit.constant(1e-6 if dtype == torch.float16 else 1e-8, dtype))


def _matmul_integer(emit: Emitter, node: Node):
    a, b = node.args
    return emit.op("MatMulInteger", emit.get(a), emit.get(b), name=node.meta.get("linear", ""))


def _widen(emit: Emitter, node: Node):
    return emit.cast(emit.tensor(node.args[0], bits=4), torch.int8)


def _channel_scale(emit: Emitter, node: Node):
    codes, scale, zero_point, group_size = node.args

    def make(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        return channel_scale(codes, scale.float(), zero_point, group_size)

    return emit.derived(codes, "channel_scale", [*shape_of(node)], torch.float32, make, scale, zero_point)


def _stored_int8(emit: Emitter, node: Node):
    """The int8 codes themselves, for a weight that the file has in few bits besides.

    Arithmetic at load would keep some 35 bytes a weight of the whole model in memory while ONNX Runtime folds it.
    """
    codes, scale, zero_point, _factor, _row_scale, group_size, _bits = node.args

    def make(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        scale = scale.float()
        return expand(codes, scale, zero_point, None, channel_scale(codes, scale, zero_point, group_size), group_size)

    return emit.derived(codes, "int8", [*shape_of(codes)], torch.int8, make, scale, zero_point)


def _expand(emit: Emitter, node: Node):
    """Plain arithmetic on constants, which ONNX Runtime does once, when it loads the file."""
    codes, scale, zero_point, factor, row_scale, group_size, bits = node.args
    if is_call(row_scale, ops.channel_scale.default):
        return _stored_int8(emit, node)
    k, n = shape_of(codes)
    grouped = emit.constant([k // group_size, group_size, n])
    values = emit.op("Reshape", emit.cast(emit.tensor(codes, bits=bits), torch.float32), grouped)
    one_row = emit.constant([1])
    if zero_point is not None:
        zero = emit.cast(emit.tensor(zero_point, bits=bits), torch.float32)
        values = emit.op("Sub", values, emit.op("Unsqueeze", zero, one_row))
    values = emit.op("Mul", values, emit.op("Unsqueeze", emit.get(scale, torch.float32), one_row))
    values = emit.op("Reshape", values, emit.constant([k, n]))
    if factor is not None:
        values = emit.op("Mul", values, emit.op("Unsqueeze", emit.get(factor), one_row))
    rounded = emit.op("Round", emit.op("Div", values, emit.get(row_scale)))
    clipped = emit.op("Clip", rounded, emit.constant(-127.0, torch.float32), emit.constant(127.0, torch.float32))
    return emit.cast(clipped, torch.int8)


def _matmul_bnb4(emit: Emitter, node: Node):
    x, codes, scale, codebook, group_size, block_size = node.args
    n, k = shape_of(codes)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(group_size // block_size, dim=1).view(-1)

    weight = emit.derived(codes, "packed", [n * k // 2], torch.uint8, pack_high_first)
    absmax = emit.derived(scale, "blocks", [n * k // block_size], dtype_of(scale), spread)
    return _kernel(
        emit, node, "MatMulBnb4", x, weight, absmax, K=k, N=n, block_size=block_size, quant_type=_QUANT_TYPE[codebook]
    )


def _matmul_nbits(emit: Emitter, node: Node):
    x, codes, scale, zero_point, bits, group_size, block_size = node.args
    k, n = shape_of(codes)
    shape = [n, -(-k // block_size), block_size * bits // 8]
    rows = emit.initializers.get(f"{codes.target}.rows")  # of an embedding that owns the codes
    weight = packed_codes(emit, codes, bits, "packed", shape) if rows is None else emit.view(rows, "packed", shape)
    scales, zeros = packed_scales(emit, codes, scale, zero_point, bits, group_size, block_size)
    return _kernel(
        emit, node, "MatMulNBits", x, weight, scales, zeros, K=k, N=n, bits=bits, block_size=block_size,
        accuracy_level=4 if is_call(x, ops.matmul_nbits_input.default) else 1,
    )  # fmt: skip


def packed_codes(emit: Emitter, codes: Node, bits: int, suffix: str, shape: list[int]):
    """Codes [K, N] as the kernels for groups read them: row by row of N, the first code in the lowest bits.

    Args:
        shape: [N, ...] bytes; more than K codes need fill up the last block.
    """
    missing = math.prod(shape[1:]) * 8 // bits - shape_of(codes)[0]
    offset = 2 ** (bits - 1) if dtype_of(codes) == torch.int8 else 0  # what a kernel takes off without zero points

    def pack(t: torch.Tensor) -> torch.Tensor:
        unsigned = t.t().contiguous().view(torch.uint8) + offset  # modulo 256
        return pack_rows(torch.nn.functional.pad(unsigned, (0, missing)), bits).view(shape)

    return emit.derived(codes, suffix, shape, torch.uint8, pack)


def packed_scales(
    emit: Emitter, codes: Node, scale: Node, zero_point: Node | None, bits: int, group_size: int, block_size: int
):
    """Scales [N, blocks] and zero points [N, bytes] or None of the same kernels, those of a longer group repeated."""
    k, n = shape_of(codes)
    blocks = -(-k // block_size)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.t().repeat_interleave(group_size // block_size, dim=1)

    scales = emit.derived(scale, "blocks", [n, blocks], dtype_of(scale), spread)
    if zero_point is None:
        return scales, None
    width = -(-blocks * bits // 8)
    return scales, emit.derived(zero_point, "packed", [n, width], torch.uint8, lambda t: pack_rows(spread(t), bits))


def _kernel(emit: Emitter, node: Node, op_type: str, x: Node, *constants, **attributes):
    """A product that is a kernel of ONNX Runtime's own, under the linear's name."""
    name = node.meta["linear"]
    output = f"{name}.output" if "result_of" in node.meta else ""
    return emit.op(op_type, emit.get(x), *constants, domain="com.microsoft", name=name, output=output, **attributes)


TRANSLATIONS = {
    ops.dequantize_linear.default: _dequantize,
    ops.quantize_linear.default: _quantize,
    ops.token_scale.default: _token_scale,
    ops.matmul_integer.default: _matmul_integer,
    ops.widen_int4.default: _widen,
    ops.expand_codes.default: _expand,
    ops.channel_scale.default: _channel_scale,
    ops.matmul_bnb4.default: _matmul_bnb4,
    ops.matmul_nbits.default: _matmul_nbits,
    # The kernel does it to its own input: there is no node.
    ops.matmul_nbits_input.default: lambda emit, node: emit.get(node.args[0]),
}
