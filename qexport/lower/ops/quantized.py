"""The quantization operators."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, is_call, shape_of
from ...graph.meta import Meta
from ...graph.schema import Arguments
from ...graph.views import operand, size_at, sizes_of, tensor_name
from ...quant.coarse_scales import coarse_codes, coarse_rows, coarse_table
from ...quant.expand import channel_scale, expand_to_int8
from ...quant.packing import pack_rows, whole_block
from ...quant.planes import plane_bits, split, tables, unsigned
from ...quant.small_floats import e8m0_values
from ..emitter import Attribute, Emitter
from ..registry import translates

ops = torch.ops.qexport


@translates(ops.dequantize_linear.default)
def _dequantize(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    bits = given.bits if given.codes.op == "get_attr" else 8
    x = emit.tensor(given.codes, bits=bits) if given.codes.op == "get_attr" else emit.get(given.codes)
    block, times, rows = None, 1, None
    if given.block_size:  # ONNX Runtime makes no kernel of blocks that are too long, OpenVINO reads no shorter last one
        block = whole_block(bits, given.block_size, size_at(node, 0))
        times, rows = given.block_size // block, -(-size_at(node, 0) // block)
    if Meta.COARSE in given.scale.meta:
        scale = _coarse_blocks(emit, given.scale, times, rows)
    else:
        scale = emit.tensor(given.scale, times=times, rows=rows) if times > 1 else emit.get(given.scale)
    zero = None if given.zero_point is None else emit.tensor(given.zero_point, bits=bits, times=times, rows=rows)
    return emit.op(
        "DequantizeLinear", x, scale, zero, axis=None if shape_of(given.scale) == () else given.axis, block_size=block
    )


@translates(ops.quantize_linear.default)
def _quantize(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    zero = emit.constant(given.zero_point, torch.int8 if given.signed else torch.uint8)
    return emit.op("QuantizeLinear", emit.get(given.x), emit.get(given.scale), zero)


@translates(ops.token_scale.default)
def _token_scale(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    dtype = dtype_of(node)
    absmax = emit.op("ReduceMax", emit.op("Abs", emit.get(given.x)), emit.constant([-1]), keepdims=1)
    if given.power != 1:
        absmax = emit.op("Pow", absmax, emit.constant(given.power, dtype))
    scale = emit.op("Mul", absmax, emit.constant(1.0 / given.qmax, dtype))
    return emit.op("Max", scale, emit.constant(1e-6 if dtype == torch.float16 else 1e-8, dtype))


@translates(ops.matmul_integer.default)
def _matmul_integer(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op("MatMulInteger", emit.get(given.a), emit.get(given.b), name=node.meta.get(Meta.LINEAR, ""))


@translates(ops.widen_int4.default)
def _widen(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.cast(emit.tensor(given.codes, bits=4), torch.int8)


@translates(ops.channel_scale.default)
def _channel_scale(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    def make(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        return channel_scale(codes, scale.float(), zero_point, given.group_size)

    return emit.derived(
        given.codes, "channel_scale", sizes_of(node), torch.float32, make, given.scale, given.zero_point
    )


def _stored_int8(emit: Emitter, given: Arguments) -> ir.Value:
    """The int8 codes themselves, for a weight that the file has in few bits besides.

    Arithmetic at load would keep some 35 bytes a weight of the whole model in memory while ONNX Runtime folds it.
    """
    group_size = given.group_size

    def make(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        scale = scale.float()
        return expand_to_int8(
            codes, scale, zero_point, None, channel_scale(codes, scale, zero_point, group_size), group_size
        )

    return emit.derived(
        given.codes, "int8", sizes_of(given.codes), torch.int8, make, given.scale, given.zero_point
    )  # fmt: skip


@translates(ops.expand_codes.default)
def _expand(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Plain arithmetic on constants, which ONNX Runtime does once, when it loads the file."""
    if is_call(given.row_scale, ops.channel_scale.default):
        return _stored_int8(emit, given)
    k, n = sizes_of(given.codes)
    grouped = emit.constant([k // given.group_size, given.group_size, n])
    values = emit.op("Reshape", emit.cast(emit.tensor(given.codes, bits=given.bits), torch.float32), grouped)
    one_row = emit.constant([1])
    if given.zero_point is not None:
        zero = emit.cast(emit.tensor(given.zero_point, bits=given.bits), torch.float32)
        values = emit.op("Sub", values, emit.op("Unsqueeze", zero, one_row))
    values = emit.op("Mul", values, emit.op("Unsqueeze", emit.get(given.scale, torch.float32), one_row))
    values = emit.op("Reshape", values, emit.constant([k, n]))
    if given.factor is not None:
        values = emit.op("Mul", values, emit.op("Unsqueeze", emit.get(given.factor), one_row))
    rounded = emit.op("Round", emit.op("Div", values, emit.get(given.row_scale)))
    clipped = emit.op("Clip", rounded, emit.constant(-127.0, torch.float32), emit.constant(127.0, torch.float32))
    return emit.cast(clipped, torch.int8)


@translates(ops.matmul_nbits_input.default)
def _nbits_input(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """No node: the kernel does it to its own input."""
    return emit.get(operand(node))


@translates(ops.matmul_nbits.default)
def _matmul_nbits(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (k, n), codes, bits, block_size = sizes_of(given.codes), given.codes, given.bits, given.block_size
    shape = [n, -(-k // block_size), block_size * bits // 8]
    rows = emit.initializers.get(f"{tensor_name(codes)}.rows")  # of an embedding that owns the codes
    weight = packed_codes(emit, codes, bits, "packed", shape) if rows is None else emit.view(rows, "packed", shape)
    scales, zeros = packed_scales(emit, codes, given.scale, given.zero_point, bits, given.group_size, block_size)
    return kernel(
        emit, node, "MatMulNBits", given.x, weight, scales, zeros, K=k, N=n, bits=bits, block_size=block_size,
        accuracy_level=4 if is_call(given.x, ops.matmul_nbits_input.default) else 1,
    )  # fmt: skip


def packed_codes(emit: Emitter, codes: Node, bits: int, suffix: str, shape: list[int]) -> ir.Value:
    """Codes [K, N] as the kernels for groups read them: row by row of N, the first code in the lowest bits.

    Args:
        shape: [N, ...] bytes; more than K codes need fill up the last block.
    """
    missing = math.prod(shape[1:]) * 8 // bits - sizes_of(codes)[0]
    signed = dtype_of(codes) == torch.int8
    few = codes.meta.get(Meta.PLANES)
    if isinstance(few, int):
        return _from_planes(emit, codes, few, bits, missing, shape)
    if few is not None:
        return _from_groups(emit, codes, few, bits, shape)
    offset = 2 ** (bits - 1) if signed else 0  # what a kernel takes off without zero points

    def pack(t: torch.Tensor) -> torch.Tensor:
        unsigned = t.t().contiguous().view(torch.uint8) + offset  # modulo 256
        return pack_rows(torch.nn.functional.pad(unsigned, (0, missing)), bits).view(shape)

    return emit.derived(codes, suffix, shape, torch.uint8, pack)


def _from_planes(
    emit: Emitter, codes: Node, few: int, bits: int, missing: int, shape: list[int],
    columns: torch.Tensor | None = None,
) -> ir.Value:  # fmt: skip
    """The same of codes that the file has in `few` bits.

    Args:
        missing: how many codes fill up a row.
        columns: the input features, all in their order without.
    """
    count = (sizes_of(codes)[0] if columns is None else len(columns)) + missing
    which = "plane" if columns is None else f"{few}_bits.plane"
    odd = few <= codes.meta.get(Meta.ODD, 0)

    def plane(place: int, t: torch.Tensor) -> torch.Tensor:
        rows = (t if columns is None else t[columns]).t().contiguous()
        return split(torch.nn.functional.pad(unsigned(rows, few, odd), (0, missing)), few)[place]

    planes = [
        emit.derived(codes, f"{which}{place}", [shape[0], count * part // 8], torch.uint8, partial(plane, place))
        for place, part in enumerate(plane_bits(few))
    ]
    return joined_planes(emit, planes, shape, tables(few, bits, dtype_of(codes) == torch.int8, odd))


def _from_groups(emit: Emitter, codes: Node, group_bits: Sequence[int], bits: int, shape: list[int]) -> ir.Value:
    """The same of groups of different bits: those of as many bits lie together, and are sorted at load."""
    n, size, every = shape[0], sizes_of(codes)[0] // len(group_bits), torch.tensor(group_bits)
    parts, order = [], []
    for few in sorted(set(group_bits)):
        groups = (every == few).nonzero().squeeze(1)
        columns = (groups[:, None] * size + torch.arange(size)).reshape(-1)
        own = [n, len(groups), size * bits // 8]
        parts.append(_from_planes(emit, codes, few, bits, 0, own, columns))
        order.append(groups)
    place = torch.cat(order).argsort()
    joined = parts[0] if len(parts) == 1 else emit.op("Concat", *parts, axis=1)
    return emit.op("Reshape", emit.op("Gather", joined, emit.table(place), axis=1), emit.constant(shape))


def joined_planes(
    emit: Emitter, planes: Sequence[ir.Value], shape: list[int], meanings: Sequence[torch.Tensor]
) -> ir.Value:
    """Bytes of a kernel, which ONNX Runtime makes of planes when it loads the file.

    Args:
        planes: as `quant.planes.split` makes them; meanings: as `tables` has them.
        shape: of the result.
    """
    parts = [
        emit.op("Reshape", emit.looked_up(plane, table), emit.constant(shape))
        for plane, table in zip(planes, meanings, strict=True)
    ]
    return reduce(lambda one, other: emit.op("BitwiseOr", one, other), parts)


def packed_scales(
    emit: Emitter, codes: Node, scale: Node, zero_point: Node | None, bits: int, group_size: int, block_size: int
) -> tuple[ir.Value, ir.Value | None]:
    """Scales [N, blocks] and zero points [N, bytes] or None of the same kernels, those of a longer group repeated."""
    k, n = sizes_of(codes)
    blocks = -(-k // block_size)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.t().repeat_interleave(group_size // block_size, dim=1)

    if Meta.COARSE in scale.meta:
        scales = coarse_scales(emit, scale, [n, blocks], spread)
    else:
        scales = emit.derived(scale, "blocks", [n, blocks], dtype_of(scale), spread)
    if zero_point is None:
        return scales, None
    width = -(-blocks * bits // 8)
    return scales, emit.derived(zero_point, "packed", [n, width], torch.uint8, lambda t: pack_rows(spread(t), bits))


def coarse_scales(
    emit: Emitter, scale: Node, shape: list[int], spread: Callable[[torch.Tensor], torch.Tensor]
) -> ir.Value:
    """Scales [N, blocks] of 8 bits, which ONNX Runtime makes floats of when it loads the file.

    Args:
        spread: from the scales of the graph to those of the blocks.
    """
    codes = emit.derived(scale, "bytes", shape, torch.uint8, lambda t: coarse_codes(spread(t))[0])
    rows = emit.derived(scale, "row_bytes", [shape[0], 1], torch.uint8, lambda t: coarse_rows(spread(t)))
    powers = e8m0_values(torch.arange(255, dtype=torch.uint8))
    made = emit.op("Mul", emit.looked_up(codes, coarse_table()), emit.looked_up(rows, powers))
    return made if dtype_of(scale) == torch.float32 else emit.cast(made, dtype_of(scale))


def _coarse_blocks(emit: Emitter, scale: Node, times: int, rows: int | None) -> ir.Value:
    """The same of shorter blocks, as DequantizeLinear wants them: [blocks, N]."""
    groups, n = sizes_of(scale)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.t().repeat_interleave(times, dim=1)[:, :rows]

    made = coarse_scales(emit, scale, [n, rows or groups * times], spread)
    return emit.op("Transpose", made, perm=[1, 0])


def kernel(
    emit: Emitter, node: Node, op_type: str, x: Node, *constants: ir.Value | None, **attributes: Attribute
) -> ir.Value:
    """A product that is a kernel of ONNX Runtime's own, under the linear's name."""
    name = node.meta[Meta.LINEAR]
    output = f"{name}.output" if Meta.RESULT_OF in node.meta else ""
    return emit.op(op_type, emit.get(x), *constants, domain="com.microsoft", name=name, output=output, more=attributes)
