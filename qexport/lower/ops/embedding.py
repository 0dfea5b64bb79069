"""Looking rows up in a quantized table."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...quant.packing import pack_rows, stored_block
from ..emitter import Emitter
from ..registry import translates
from .quantized import packed_codes, packed_scales

ops = torch.ops.qexport


@translates(ops.gather_quantized.default)
def _gather_quantized(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if not emit.operators.contrib:
        return _in_standard_operators(emit, given)
    k, n = sizes_of(given.codes)
    bits, block_size = given.bits, stored_block(given.bits, given.group_size)
    table = packed_codes(emit, given.codes, bits, "rows", [n, k * bits // 8])
    scales, zeros = packed_scales(
        emit, given.codes, given.scale, given.zero_point, bits, given.group_size, block_size
    )  # fmt: skip
    return emit.op(
        "GatherBlockQuantized", table, emit.get(given.ids), scales, zeros, domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _in_standard_operators(emit: Emitter, given: Arguments) -> ir.Value:
    """Columns of the table [K, V] are gathered as codes, multiplied by their scales, and turned into rows.

    ONNX has no Gather of 4-bit codes, so that bytes of two are gathered and taken apart. They are the bytes of the
    tensor that an output projection reads, where there is one: the file has them once. Plain arithmetic takes the place
    of a DequantizeLinear, of which OpenVINO wants codes of known size.
    """
    (k, _), bits, dtype = sizes_of(given.codes), given.bits, dtype_of(given.scale)
    block = stored_block(bits, given.group_size)
    ids, middle = emit.get(given.ids, torch.int64), emit.constant([1])
    flat = emit.op("Reshape", ids, emit.constant([-1]))

    def columns(node: Node) -> ir.Value:
        times = 1 if node is given.codes else given.group_size // block
        return emit.cast(_columns(emit, node, flat, bits, times), dtype)

    values = emit.op("Reshape", columns(given.codes), emit.constant([k // block, block, -1]))
    if given.zero_point is not None:
        values = emit.op("Sub", values, emit.op("Unsqueeze", columns(given.zero_point), middle))
    scale = emit.op("Gather", _again(emit, given.scale, 8, given.group_size // block), flat, axis=1)
    values = emit.op("Mul", values, emit.op("Unsqueeze", scale, middle))
    rows = emit.op("Transpose", emit.op("Reshape", values, emit.constant([k, -1])), perm=[1, 0])
    return emit.op("Reshape", rows, emit.op("Concat", emit.op("Shape", ids), emit.constant([k]), axis=0))


def _columns(emit: Emitter, node: Node, ids: ir.Value, bits: int, times: int) -> ir.Value:
    """Columns of a matrix of codes, one code an element: integers [rows, n].

    Args:
        times: see `Emitter.tensor`.
    """
    (rows, width), held = sizes_of(node), 8 // bits
    if bits == 8:
        return emit.op("Gather", _again(emit, node, bits, times), ids, axis=1)
    shape = [rows * times, -(-width // held)]
    if width % held:  # a row does not end with a byte there
        packed = emit.derived(node, "bytes", shape, torch.uint8, lambda t: pack_rows(_unsigned(t, bits, times), bits))
    else:
        packed = _again(emit, node, bits, times)
    count = emit.constant(held)
    taken = emit.cast(emit.op("Gather", packed, emit.op("Div", ids, count), axis=1), torch.int32)
    units = emit.constant([1 << bits * i for i in range(held)], torch.int32)
    unit = emit.op("Gather", units, emit.op("Mod", ids, count))
    code, values = emit.op("Div", taken, unit), emit.constant(1 << bits, torch.int32)
    if dtype_of(node) == torch.uint8:
        return emit.op("Mod", code, values)
    half = emit.constant(1 << bits - 1, torch.int32)  # of two's complement
    return emit.op("Sub", emit.op("Mod", emit.op("Add", code, half), values), half)


def _again(emit: Emitter, node: Node, bits: int, times: int) -> ir.Value:
    """A matrix of codes or scales under a name of its own, codes of few bits as bytes; the file has it once.

    ONNX Runtime makes no kernel of a product whose weight or scales something else reads.
    """
    (rows, width), held = sizes_of(node), 8 // bits
    dtype = ir.DataType.UINT8 if bits < 8 else None
    return emit.view(emit.tensor(node, bits=bits, times=times), "table", [rows * times, width // held], dtype)


def _unsigned(codes: torch.Tensor, bits: int, times: int) -> torch.Tensor:
    return codes.repeat_interleave(times, dim=0).contiguous().view(torch.uint8) & (1 << bits) - 1
