"""RWKV's weighted means as a Scan over the tokens, in float32 whatever the rest of the file is in."""

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.ops.wkv import FAR
from ...graph.schema import Arguments
from ..emitter import Emitter
from ..registry import translates

_SINGLE = torch.float32


@translates(torch.ops.qexport.wkv.default)
def _wkv(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    parts = (given.decay, given.first, given.key, given.value, given.past)
    decay, first, key, value, past = (_as(emit, emit.get(part), dtype_of(part), _SINGLE) for part in parts)
    axis = emit.constant([1])
    values, weights, most = (
        emit.op("Squeeze", part, axis) for part in emit.several(3, "Split", past, emit.constant([1, 1, 1]), axis=1)
    )
    none = emit.op("Equal", weights, emit.constant(0, _SINGLE))
    most = emit.op("Where", none, emit.constant(FAR, _SINGLE), most)
    name = emit.fresh(f"{node.name}/step")
    with emit.branch(f"{name}/") as nodes:
        inner = [ir.Value(name=f"{name}/{part}", type=ir.TensorType(ir.DataType.FLOAT)) for part in "vwmkx"]
        v, w, m, k, x = inner
        own = emit.op("Add", k, first)
        top = emit.op("Max", m, own)
        old, new = (emit.op("Exp", emit.op("Sub", part, top)) for part in (m, own))
        out = emit.op("Div", _sum(emit, old, v, emit.op("Mul", new, x)), _sum(emit, old, w, new))
        later = emit.op("Add", m, decay)
        top = emit.op("Max", later, k)
        old, new = (emit.op("Exp", emit.op("Sub", part, top)) for part in (later, k))
        handed_on = [_sum(emit, old, v, emit.op("Mul", new, x)), _sum(emit, old, w, new), top, out]
    for result in handed_on:
        result.type = ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph(inner, handed_on, nodes=nodes, name=name)
    made = tuple(ir.Value(name=f"{name}:{i}") for i in range(4))
    axes = {"scan_input_axes": [1, 1], "scan_output_axes": [1]}
    attributes: dict[str, Any] = {"body": body, "num_scan_inputs": 2, **axes}
    emit.nodes.append(ir.node("Scan", [values, weights, most, key, value], attributes, outputs=made, name=name))
    after = emit.op("Concat", *(emit.op("Unsqueeze", part, axis) for part in made[:3]), axis=1)
    results = (made[3], given.value), (after, given.past)
    return tuple(_as(emit, part, _SINGLE, dtype_of(like)) for part, like in results)


def _sum(emit: Emitter, old: ir.Value, kept: ir.Value, new: ir.Value) -> ir.Value:
    return emit.op("Add", emit.op("Mul", old, kept), new)


def _as(emit: Emitter, value: ir.Value, now: torch.dtype, then: torch.dtype) -> ir.Value:
    return value if now == then else emit.cast(value, then)
