"""GroupQueryAttention, and the reordering of tokens that it asks for."""

import operator

import torch
from torch.fx import Node

from ...passes.edit import is_call, shape_of
from ..emitter import Emitter

aten = torch.ops.aten
ops = torch.ops.qexport
_END = 2**63 - 1
_GRANULARITY = {1: "PER_TENSOR", 3: "PER_CHANNEL"}  # by the axes of the scale


def _real_first(emit: Emitter, node: Node):
    """Few nodes, since every step of decoding runs them.

    Lengths are sums of ones and not read from shapes: those are on the CPU, and so is what meets them. Orders may be
    negative, which counts from the end, as the gathering operators take it: that spares the modulo.
    """
    mask, ids = (emit.get(argument) for argument in node.args)
    zero, one, row = emit.constant(0), emit.constant(1), emit.constant([1])
    ones = emit.op("Clip", ids, one, one)
    place = emit.op("CumSum", ones, one, exclusive=1)
    size = emit.op("ReduceSum", ones, row)
    past = emit.op("Sub", emit.op("ReduceSum", emit.op("Clip", mask, one, one), row), size)
    columns = emit.op("Add", place, past)
    flags = emit.op("Clip", mask, zero, one)
    counts, new = (emit.op("GatherElements", x, columns, axis=1) for x in (emit.op("CumSum", flags, one), flags))
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
    last = emit.op("Sub", emit.op("Add", emit.op("Sub", everything, many), size), one)
    return (
        forward, backward, emit.op("Unsqueeze", valid, row), emit.cast(emit.op("Squeeze", last, row), torch.int32),
        emit.cast(emit.op("Shape", mask, start=1, end=2), torch.int32),
    )  # fmt: skip


def _take_tokens(emit: Emitter, node: Node):
    x, order = node.args
    if len(shape_of(x)) == 2:
        return emit.op("GatherElements", emit.get(x), emit.get(order), axis=1)
    places = emit.op("Unsqueeze", emit.get(order), emit.constant([2]))
    return emit.op("GatherND", emit.get(x), places, batch_dims=1)


def _grouped_attention(emit: Emitter, node: Node):
    *tensors, key_scale, value_scale, bits, scale, softcap, window = node.args
    query, key, value, past_key = tensors[:4]
    kv_heads = shape_of(past_key)[1]
    size = shape_of(key)[-1] // kv_heads
    packed = _packed(query, key, value)
    query, key, value = (packed, None, None) if packed is not None else (query, key, value)
    return emit.op(
        "GroupQueryAttention", *(emit.get(a) for a in (query, key, value, *tensors[3:])), None, None, None,
        emit.get(key_scale), emit.get(value_scale),
        domain="com.microsoft", outputs=3, num_heads=shape_of(node.args[0])[-1] // size, kv_num_heads=kv_heads,
        scale=float(scale), softcap=float(softcap) or None, do_rotary=int(tensors[7] is not None),
        local_window_size=window or -1, kv_cache_bit_width=bits or None,
        **({name: _GRANULARITY[len(shape_of(key_scale))] for name in ("k_quant_type", "v_quant_type")} if bits else {}),
    )  # fmt: skip


def _packed(query: Node, key: Node, value: Node) -> Node | None:
    """The value of which query, key and value are the first, second and third part, and there is no other."""
    parts = (query, key, value)
    source = query.args[0] if query.args else None
    if all(is_call(part, operator.getitem) for part in parts) and is_call(source, aten.split_with_sizes.default):
        in_order = [part.args for part in parts] == [(source, i) for i in range(3)]
        return source.args[0] if in_order and len(source.args[1]) == 3 else None
    if not all(is_call(part, aten.slice.Tensor) and part.args[0] is source for part in parts):
        return None
    start = 0
    for part in parts:
        _, axis, begin, end = (*part.args, _END)[:4]
        if axis not in (2, -1) or begin != start or len(part.args) > 4:
            return None
        start = min(end, shape_of(source)[-1])
    return source if start == shape_of(source)[-1] else None


TRANSLATIONS = {
    ops.real_first.default: _real_first, ops.take_tokens.default: _take_tokens,
    ops.grouped_attention.default: _grouped_attention,
}  # fmt: skip
