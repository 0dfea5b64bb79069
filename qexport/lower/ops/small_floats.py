"""Products with weights of 4-bit and 8-bit floats."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...errors import NumericsError
from ...graph.edit import dtype_of, is_call, shape_of
from ...graph.schema import Arguments
from ...graph.views import sizes_of, tensor_name
from ...passes.formats.small_floats import native_kernel, ops
from ...quant.formats.small_floats import MicroscaledFormat, SmallFloatFormat, format_named
from ...quant.packing import pack_int4
from ...quant.small_floats import e2m1_values, e4m3_codes, e4m3_values, e8m0_values
from ..emitter import Emitter
from ..registry import translates
from .quantized import kernel

_BYTES = torch.arange(256, dtype=torch.uint8)
# Exponents of E4M3: scales that are powers of two go into E4M3 numbers from 2^-9 to 2^8.
_E4M3_TOP, _E4M3_OCTAVES = 8, 17
ZERO_OF_8_BITS = 128  # what MatMulNBits takes off without zero points


@translates(ops.dequantize_floats.default)
def _dequantize(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Plain arithmetic on constants, which ONNX Runtime does once, when it loads the file."""
    fmt, (n, k) = format_named(given.name), sizes_of(given.codes)
    if fmt.bits == 4:
        pairs = torch.stack([e2m1_values(_BYTES & 15), e2m1_values(_BYTES >> 4)], dim=1)
        values = emit.op("Reshape", emit.looked_up(_packed(emit, given), pairs), emit.constant([n, k]))
    else:
        values = emit.cast(_e4m3(emit, given), torch.float32)
    scale, groups = _scales(emit, given, fmt), fmt.groups(k)
    if groups > 1:
        size = fmt.group_size
        whole = emit.op("Expand", emit.op("Unsqueeze", scale, emit.constant([2])), emit.constant([n, groups, size]))
        scale = emit.op("Reshape", whole, emit.constant([n, groups * size]))
        if groups * size > k:
            scale = emit.op("Slice", scale, emit.constant([0]), emit.constant([k]), emit.constant([1]))
    return emit.op("Transpose", emit.op("Mul", values, scale), perm=[1, 0])


@translates(ops.matmul_floats_as_integers.default)
def _as_integers(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Numbers times two and scales divided by two, both looked up when ONNX Runtime loads the file."""
    fmt, (n, k) = format_named(given.name), sizes_of(given.codes)
    shape = emit.constant([n, fmt.groups(k), fmt.group_size])
    weight = emit.op("Reshape", integers(emit, _packed(emit, given)), shape)
    rounds = is_call(given.x, ops.matmul_nbits_input.default)
    return kernel(
        emit, node, "MatMulNBits", given.x, weight, _scales(emit, given, fmt, 0.5), K=k, N=n, bits=8,
        block_size=fmt.group_size, accuracy_level=4 if rounds else 1,
    )  # fmt: skip


@translates(ops.matmul_floats.default)
def _matmul(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    fmt, (_, k) = format_named(given.name), sizes_of(given.codes)
    size = fmt.group_size if fmt.group_size > 0 else k
    if fmt.bits == 8:
        constants = _e4m3(emit, given), _scales(emit, given, fmt), emit.get(given.input_scale)
    elif isinstance(fmt, MicroscaledFormat):
        constants = _packed(emit, given), *_in_e4m3(emit, given)
    else:
        constants = _packed(emit, given), emit.get(given.scale), emit.get(given.tensor_scale)
    return kernel(emit, node, native_kernel(fmt), given.x, *constants, block_size=size)


def integers(emit: Emitter, packed: ir.Value) -> ir.Value:
    """Twice E2M1 numbers, two of them a byte, as 8-bit codes of kernels that take 128 off; [..., 2]."""
    both = torch.stack([_BYTES & 15, _BYTES >> 4], dim=1)
    return emit.looked_up(packed, (2 * e2m1_values(both) + ZERO_OF_8_BITS).to(torch.uint8))


def halved_scales(emit: Emitter, codes: ir.Value, exponents: bool) -> ir.Value:
    """Half of the scales whose bytes these are, float32; exponents: powers of two, else E4M3 numbers."""
    return emit.looked_up(codes, (e8m0_values(_BYTES) if exponents else e4m3_values(_BYTES)) / 2)


def _packed(emit: Emitter, given: Arguments) -> ir.Value:
    """Two codes a byte, the first in the low bits."""
    n, k = sizes_of(given.codes)
    return emit.derived(given.codes, "packed", [n, k // 2], torch.uint8, lambda t: pack_int4(t).view(n, k // 2))


def _e4m3(emit: Emitter, given: Arguments) -> ir.Value:
    dtype = torch.float8_e4m3fn
    return emit.derived(given.codes, "e4m3", sizes_of(given.codes), dtype, lambda t: t.view(dtype))


def _scales(emit: Emitter, given: Arguments, fmt: SmallFloatFormat, factor: float = 1.0) -> ir.Value:
    """float32 [N, G]; factor: a power of two, for scales that are codes."""
    n, k = sizes_of(given.codes)
    scale: ir.Value = emit.get(given.scale)
    if isinstance(fmt, MicroscaledFormat):
        return emit.looked_up(scale, e8m0_values(_BYTES) * factor)
    if given.tensor_scale is not None:
        return emit.op("Mul", emit.looked_up(scale, e4m3_values(_BYTES) * factor), emit.get(given.tensor_scale))
    rows = fmt.rows_per_scale
    if rows == 1:
        return scale
    tiles, groups = -(-n // rows), fmt.groups(k)
    spread = emit.op("Expand", emit.op("Unsqueeze", scale, emit.constant([1])), emit.constant([tiles, rows, groups]))
    spread = emit.op("Reshape", spread, emit.constant([tiles * rows, groups]))
    return emit.op("Slice", spread, emit.constant([0]), emit.constant([n]), emit.constant([0])) if n % rows else spread


def _in_e4m3(emit: Emitter, given: Arguments) -> tuple[ir.Value, ir.Value]:
    """Powers of two as E4M3 scales [N, G] and one float32 scale [] for all of them, found when the file is loaded.

    Raises:
        NumericsError: they are further apart than E4M3 reaches, when the file is written.
    """
    place = tensor_name(given.scale)

    def check(codes: torch.Tensor) -> torch.Tensor:
        if int(codes.max()) - int(codes.min()) > _E4M3_OCTAVES:
            raise NumericsError(
                f"has scales further apart than 2^{_E4M3_OCTAVES}, which CUDA's kernel cannot hold", place=place,
                remedy="Keep that linear in float by an override",
            )  # fmt: skip
        return codes

    reached = torch.arange(_E4M3_TOP - _E4M3_OCTAVES, _E4M3_TOP + 1)
    codes = emit.derived(given.scale, "e8m0", sizes_of(given.scale), torch.uint8, check)
    codes = emit.cast(codes, torch.int32)
    top = emit.op("ReduceMax", codes, keepdims=0)
    place_in = emit.op("Add", emit.op("Sub", codes, top), emit.constant(_E4M3_OCTAVES, torch.int32))
    blocks = emit.op("Gather", emit.table(e4m3_codes(torch.exp2(reached.float()))), place_in)
    return blocks, emit.op("Gather", emit.table(e8m0_values(_BYTES) * 2.0**-_E4M3_TOP), top)


@translates(ops.round_e4m3.default)
def _round(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if shape_of(given.scale) != ():
        steps = emit.op("Div", emit.get(given.x), emit.get(given.scale))
        return emit.op("Mul", emit.cast(emit.cast(steps, torch.float8_e4m3fn), dtype_of(node)), emit.get(given.scale))
    scale, zero = emit.get(given.scale), emit.constant(0.0, torch.float8_e4m3fn)
    return emit.op("DequantizeLinear", emit.op("QuantizeLinear", emit.get(given.x), scale, zero), scale, zero)
