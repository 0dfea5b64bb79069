"""GroupQueryAttention, and the reordering of tokens that it asks for."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, is_call, shape_of
from ...graph.schema import Arguments, bind
from ...graph.views import Item, Slice, size_at
from ..emitter import Attribute, Emitter
from ..prompt_attention import Read, Sizes, attend
from ..registry import translates

aten = torch.ops.aten
ops = torch.ops.qexport
_GRANULARITY = {1: "PER_TENSOR", 3: "PER_CHANNEL"}  # by the axes of the scale


@translates(ops.real_first.default)
def _real_first(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """Few nodes, since every step of decoding runs them.

    Lengths are sums of ones and not read from shapes: those are on the CPU, and so is what meets them. Orders may be
    negative, which counts from the end, as the gathering operators take it: that spares the modulo.
    """
    mask, ids = emit.get(given.attention_mask), emit.get(given.input_ids)
    zero, one, row = emit.constant(0), emit.constant(1), emit.constant([1])
    ones = emit.op("Clip", ids, one, one)
    place = emit.op("CumSum", ones, one, exclusive=1)
    size = emit.op("ReduceSum", ones, row)
    past = emit.op("Sub", emit.op("ReduceSum", emit.op("Clip", mask, one, one), row), size)
    columns = emit.op("Add", place, past)
    flags = emit.op("Clip", mask, zero, one)
    counted = emit.op("CumSum", flags, one)
    counts, new = (emit.op("GatherElements", x, columns, axis=1) for x in (counted, flags))
    many, everything = (emit.op("ReduceSum", x, row) for x in (new, flags))
    lead = emit.op("ReduceSum", emit.cast(emit.op("Equal", counts, zero), torch.int64), row)
    forward = emit.op("Add", place, emit.op("Sub", lead, size))
    backward = emit.op("Sub", place, lead)
    # Real tokens stand together where as many places behind the first as there are of them hold the last one.
    end = emit.op("Sub", emit.op("Add", lead, many), one)
    reached = emit.op("GatherElements", counts, end, axis=1)
    together = emit.op("Equal", reached, emit.op("Max", everything, one))
    at_first = emit.op("And", together, emit.op("Equal", past, zero))
    valid = emit.op("Or", at_first, emit.op("Equal", many, size))
    held = emit.op("Max", everything, size)
    # Ones in front for as many tokens as the row has: before its last `size` places there cannot be all of them, unless
    # that is one place.
    reached = emit.op("GatherElements", counted, emit.op("Sub", held, size), axis=1)
    valid = emit.op("Or", valid, emit.op("Equal", reached, held))
    last = emit.op("Sub", held, one)
    return (
        forward, backward, emit.op("Unsqueeze", valid, row), emit.cast(emit.op("Squeeze", last, row), torch.int32),
        emit.cast(emit.op("Shape", mask, start=1, end=2), torch.int32),
    )  # fmt: skip


@translates(ops.take_tokens.default)
def _take_tokens(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if len(shape_of(given.x)) == 2:
        return emit.op("GatherElements", emit.get(given.x), emit.get(given.order), axis=1)
    places = emit.op("Unsqueeze", emit.get(given.order), emit.constant([2]))
    return emit.op("GatherND", emit.get(given.x), places, batch_dims=1)


@translates(ops.grouped_attention.default)
def _grouped_attention(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    kv_heads = size_at(given.past_key, 1)
    size = size_at(given.key, -1) // kv_heads
    heads = size_at(given.query, -1) // size
    query, key, value = given.query, given.key, given.value
    if (packed := _packed(query, key, value)) is not None:
        query, key, value = packed, None, None
    codes: dict[str, Attribute] = {}
    if given.bits:
        codes = dict.fromkeys(("k_quant_type", "v_quant_type"), _GRANULARITY[len(shape_of(given.key_scale))])
    read = Read(
        emit.get(query), emit.get(key), emit.get(value), emit.get(given.past_key), emit.get(given.past_value),
        emit.get(given.last), emit.get(given.total), emit.get(given.cos), emit.get(given.sin), emit.get(given.bias),
        emit.get(given.sinks), emit.get(given.key_scale), emit.get(given.value_scale),
    )  # fmt: skip
    attributes: dict[str, Attribute] = {
        "num_heads": heads, "kv_num_heads": kv_heads, "scale": float(given.scale),
        "softcap": float(given.softcap) or None, "do_rotary": int(given.cos is not None),
        "local_window_size": given.window or -1, "kv_cache_bit_width": given.bits or None, **codes,
    }  # fmt: skip
    if given.bits and not given.e4m3 and emit.prompts_in_floats:
        rotated = 0 if given.cos is None else 2 * size_at(given.cos, 1)
        return attend(emit, read, attributes, Sizes(heads, kv_heads, size, rotated, given.bits))
    return emit.several(3, "GroupQueryAttention", *read.in_order(), domain="com.microsoft", more=attributes)


@translates(ops.position_bias.default)
def _position_bias(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Lengths are sums of ones here too."""
    dtype, zero, one, front = dtype_of(node), emit.constant(0), emit.constant(1), emit.constant([0])
    mask, ids = (
        emit.op("Slice", emit.get(x), front, emit.constant([1]), front)
        for x in (given.attention_mask, given.input_ids)
    )
    ones = emit.op("Clip", mask, one, one)
    none = emit.cast(emit.op("Clip", ids, zero, zero), dtype)  # of every new token
    table = emit.get(given.table)
    if size_at(given.table, 1) == 1:
        back = emit.op("CumSum", ones, one, exclusive=1, reverse=1)
        places = emit.cast(emit.op("Neg", back), dtype)
        bias = emit.op("Mul", emit.op("Unsqueeze", table, front), emit.op("Unsqueeze", places, front))
    else:
        places = emit.op("Squeeze", emit.op("CumSum", ones, one, exclusive=1), front)
        bias = emit.op("Unsqueeze", emit.op("Gather", table, places, axis=1), front)
    wide = emit.op("Unsqueeze", bias, emit.constant([2]))
    return emit.op("Add", wide, emit.op("Unsqueeze", none, emit.constant([1, 3])))


def _packed(query: Node, key: Node, value: Node) -> Node | None:
    """The value of which query, key and value are the first, second and third part, and there is no other."""
    parts = (query, key, value)
    items = [item for part in parts if (item := Item.match(part)) is not None]
    if len(items) == len(parts):
        source = items[0].source
        if not is_call(source, aten.split_with_sizes.default) or items != [Item(source, i) for i in range(3)]:
            return None
        split = bind(source)
        return split.self if len(split.split_sizes) == 3 else None
    cuts = [cut for part in parts if (cut := Slice.match(part)) is not None]
    if len(cuts) < len(parts):
        return None
    whole, start = cuts[0].x, 0
    for cut in cuts:
        begin, end = cut.bounds
        if cut.x is not whole or cut.dim not in (2, -1) or begin != start or cut.step != 1 or isinstance(end, Node):
            return None
        start = min(end, size_at(whole, -1))
    return whole if start == size_at(whole, -1) else None
