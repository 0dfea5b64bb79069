"""Long prompts in front of a cache of codes: attention over floats, whose kernel is made for many tokens.

ONNX Runtime's attention over codes reads the cache for one token fast, and takes three times as long as that over
floats for 2,048 of them. So the node is there twice, as the branches of an If on the number of new tokens: many are
rounded to codes in front of it, and what these stand for is attended to in floats. The numbers are the same.

Steps lose nothing by it: what a branch returns is written where the output of the file lies, a shared cache included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from ..artifact.branches import PROMPTS, STEPS
from .emitter import Attribute, Emitter

# New tokens of a call from which the other kernel is faster.
MANY = 64
_CONTRIB = "com.microsoft"
_OF_CODES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")


@dataclass(frozen=True)
class Read:
    """What GroupQueryAttention reads.

    Attributes:
        query, key, value: [batch, tokens, features of all heads]; None for the last two where the first has all three.
        past_key, past_value: [batch, heads of keys, room, features of a head].
        last, total: as `real_first` returns them.
        cos, sin, bias, sinks, key_scale, value_scale: as the operator has them; None without.
    """

    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    last: ir.Value
    total: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    bias: ir.Value | None
    sinks: ir.Value | None
    key_scale: ir.Value | None
    value_scale: ir.Value | None

    def in_order(self) -> tuple[ir.Value | None, ...]:
        return (
            self.query, self.key, self.value, self.past_key, self.past_value, self.last, self.total, self.cos, self.sin,
            None, self.bias, self.sinks, self.key_scale, self.value_scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of attention.

    Attributes:
        heads: of queries; kv_heads: of keys; head: features of one.
        rotated: features of a head that `cos` and `sin` rotate.
        bits: of a code; two of 4 share a byte.
    """

    heads: int
    kv_heads: int
    head: int
    rotated: int
    bits: int

    @property
    def stored(self) -> ir.DataType:
        """The type of the cache."""
        return ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8


def attend(emit: Emitter, read: Read, attributes: Mapping[str, Attribute], sizes: Sizes) -> tuple[ir.Value, ...]:
    """Add GroupQueryAttention over a cache of integers, and its twin for many new tokens.

    Args:
        attributes: of the node.

    Returns:
        What the node returns.
    """
    query, total = read.query, read.total
    length = emit.shared("new_tokens", lambda: emit.cast(emit.op("Shape", query, start=1, end=2), torch.int32))
    past = emit.shared("past_tokens", lambda: emit.op("Sub", total, length))
    many = emit.shared("many_tokens", lambda: emit.op("Greater", length, emit.constant([MANY - 1], torch.int32)))
    with emit.branch(PROMPTS) as nodes:
        prompts = _graph(PROMPTS, nodes, _in_floats(emit, read, attributes, sizes, past), sizes)
    with emit.branch(STEPS) as nodes:
        made = emit.several(3, "GroupQueryAttention", *read.in_order(), domain=_CONTRIB, more=attributes)
        steps = _graph(STEPS, nodes, made, sizes)
    return emit.several(3, "If", many, then_branch=prompts, else_branch=steps)


def _graph(prefix: str, nodes: list[ir.Node], made: tuple[ir.Value, ...], sizes: Sizes) -> ir.Graph:
    for value, dtype in zip(made, (ir.DataType.FLOAT, sizes.stored, sizes.stored), strict=True):
        value.type = ir.TensorType(dtype)
    return ir.Graph([], made, nodes=nodes, name=prefix.rstrip("/"))


def _in_floats(
    emit: Emitter, read: Read, attributes: Mapping[str, Attribute], sizes: Sizes, past: ir.Value
) -> tuple[ir.Value, ...]:
    query, key, value = read.query, read.key, read.value
    width = sizes.kv_heads * sizes.head
    if key is None or value is None:
        features = emit.constant([sizes.heads * sizes.head, width, width])
        query, key, value = emit.several(3, "Split", query, features, axis=2)
    if read.cos is not None:
        place = emit.cast(past, torch.int64)
        query, key = (
            emit.op(
                "RotaryEmbedding", part, place, read.cos, read.sin, domain=_CONTRIB, num_heads=count,
                rotary_embedding_dim=sizes.rotated,
            )
            for part, count in ((query, sizes.heads), (key, sizes.kv_heads))
        )  # fmt: skip
    (keys, present_key, before_keys), (values, present_value, before_values) = (
        _cached(emit, new, old, scale, read.total, past, sizes)
        for new, old, scale in ((key, read.past_key, read.key_scale), (value, read.past_value, read.value_scale))
    )
    floats = replace(
        read, query=query, key=keys, value=values, past_key=before_keys, past_value=before_values, cos=None, sin=None,
        key_scale=None, value_scale=None,
    )  # fmt: skip
    kept = {name: given for name, given in attributes.items() if name not in _OF_CODES} | {"do_rotary": 0}
    attended, *_ = emit.several(3, "GroupQueryAttention", *floats.in_order(), domain=_CONTRIB, more=kept)
    return attended, present_key, present_value


def _cached(
    emit: Emitter, new: ir.Value, old: ir.Value, scale: ir.Value | None, total: ir.Value, past: ir.Value, sizes: Sizes
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys or values on their way through a cache.

    Args:
        new: [batch, tokens, features of all heads].
        old: [batch, heads, room, features], of which the first `past` places are filled and those from `total` on are
            left as they are.

    Returns:
        What codes of the new ones stand for; the cache with their codes; what stands in front of them, in floats.
    """
    if scale is None or scale.shape is None:
        raise TypeError("a cache of codes has scales")
    width = sizes.kv_heads * sizes.head
    flat = emit.op("Reshape", scale, emit.constant([width])) if len(scale.shape) == 3 else scale
    codes = _codes(emit, emit.op("Div", new, flat), sizes)
    by_head = emit.op("Reshape", codes, emit.constant([0, 0, sizes.kv_heads, sizes.head]))
    stored = by_head if sizes.bits == 8 else _packed(emit, by_head)
    begin, end, axes = (emit.constant([n], torch.int32) for n in (0, torch.iinfo(torch.int32).max, 2))
    front = emit.op("Slice", old, begin, past, axes)
    behind = emit.op("Slice", old, total, end, axes)
    present = emit.op("Concat", front, emit.op("Transpose", stored, perm=[0, 2, 1, 3]), behind, axis=2)
    front = front if sizes.bits == 8 else _unpacked(emit, front, sizes)
    return _numbers(emit, codes, flat, sizes), present, _numbers(emit, front, scale, sizes)


# One scale for all in both operators, and the channels' own beside them: ONNX Runtime's kernels for scales along the
# last axis go through them a number at a time, and take ten times as long.
def _codes(emit: Emitter, scaled: ir.Value, sizes: Sizes) -> ir.Value:
    """Numbers rounded to integers of the cache's range, half to even; those of 4 bits as uint8, plus 8."""
    codes = emit.op("QuantizeLinear", scaled, emit.constant(1.0, torch.float32), _zero(emit, sizes))
    return codes if sizes.bits == 8 else emit.op("Min", codes, emit.constant(15, torch.uint8))


def _numbers(emit: Emitter, codes: ir.Value, scale: ir.Value, sizes: Sizes) -> ir.Value:
    """What codes stand for."""
    integers = emit.op("DequantizeLinear", codes, emit.constant(1.0, torch.float32), _zero(emit, sizes))
    return emit.op("Mul", integers, scale)


def _zero(emit: Emitter, sizes: Sizes) -> ir.Value:
    return emit.constant(0, torch.int8) if sizes.bits == 8 else emit.constant(8, torch.uint8)


def _packed(emit: Emitter, codes: ir.Value) -> ir.Value:
    """Two codes of 4 bits in a byte, the first in its low half: [..., features] as [..., features / 2]."""
    last = emit.constant([-1])
    pairs = emit.op("Reshape", codes, emit.constant([0, 0, 0, -1, 2]))
    low, high = (emit.op("Squeeze", half, last) for half in emit.several(2, "Split", pairs, axis=-1, num_outputs=2))
    return emit.op("BitwiseOr", low, emit.op("BitShift", high, emit.constant(4, torch.uint8), direction="LEFT"))


def _unpacked(emit: Emitter, stored: ir.Value, sizes: Sizes) -> ir.Value:
    """What `_packed` packed, of any number of places: [batch, heads, places, features]."""
    last = emit.constant([-1])
    low = emit.op("BitwiseAnd", stored, emit.constant(15, torch.uint8))
    high = emit.op("BitShift", stored, emit.constant(4, torch.uint8), direction="RIGHT")
    pairs = emit.op("Concat", emit.op("Unsqueeze", low, last), emit.op("Unsqueeze", high, last), axis=-1)
    # The places are copied and the features said: of no places, -1 would stand for anything.
    return emit.op("Reshape", pairs, emit.constant([0, 0, 0, sizes.head]))
