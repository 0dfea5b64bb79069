"""xLSTM's matrix memory as a Scan over the tokens."""

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import END, size_at
from ..emitter import ONNX_DTYPE, Emitter
from ..registry import translates


@translates(torch.ops.qexport.matrix_lstm.default)
def _matrix_lstm(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    """The memory keeps C and n together: n is what a further value of 1 leaves."""
    dtype, width = dtype_of(given.value), size_at(given.value, 3)
    kind = ir.TensorType(ONNX_DTYPE[dtype])
    query, key, value, gate, forget, past = (
        emit.get(part, dtype)
        for part in (given.query, given.key, given.value, given.input_gate, given.forget_gate, given.past)
    )
    last, first, one = emit.constant([-1]), emit.constant([0]), emit.constant([1])
    query = emit.op("Mul", query, emit.constant(given.scale, dtype))
    pads = emit.constant([0, 0, 0, 0, 0, 0, 0, 1])
    value = emit.op("Pad", value, pads, emit.constant(1.0, dtype))
    kept = emit.op("Neg", emit.op("Softplus", emit.op("Neg", forget)))  # log sigmoid
    memory = emit.op("Slice", past, first, emit.constant([width + 1]), last)
    most = emit.op("Slice", past, emit.constant([width + 1]), emit.constant([END]), last)
    most = emit.op("Slice", most, first, one, emit.constant([2]))
    name = emit.fresh(f"{node.name}/step")
    with emit.branch(f"{name}/") as nodes:
        c, m, *now = inner = [ir.Value(name=f"{name}/{part}", type=kind) for part in "cmqkvif"]
        q, k, v, i, f = now
        i, f = (emit.op("Unsqueeze", part, emit.constant([2, 3])) for part in (i, f))
        decayed = emit.op("Add", f, m)
        top = emit.op("Max", decayed, i)
        pair = emit.op("Mul", emit.op("Unsqueeze", k, last), emit.op("Unsqueeze", v, emit.constant([2])))
        old = emit.op("Mul", emit.op("Exp", emit.op("Sub", decayed, top)), c)
        new = emit.op("Mul", emit.op("Exp", emit.op("Sub", i, top)), pair)
        after = emit.op("Add", old, new)
        row = emit.op("MatMul", emit.op("Unsqueeze", q, emit.constant([2])), after)
        read = emit.op("Squeeze", row, emit.constant([2]))
        total, norm = (
            emit.op("Slice", read, emit.constant([start]), emit.constant([end]), last)
            for start, end in ((0, width), (width, width + 1))
        )
        least = emit.op("Squeeze", emit.op("Exp", emit.op("Neg", top)), emit.constant([3]))
        under = emit.op("Add", emit.op("Max", emit.op("Abs", norm), least), emit.constant(given.eps, dtype))
        handed_on = [after, top, emit.op("Div", total, under)]
    for result in handed_on:
        result.type = kind
    made = tuple(ir.Value(name=f"{name}:{i}") for i in range(3))
    inputs = [query, key, value, gate, kept]
    attributes: dict[str, Any] = {
        "body": ir.Graph(inner, handed_on, nodes=nodes, name=name), "num_scan_inputs": len(inputs),
        "scan_input_axes": [1] * len(inputs), "scan_output_axes": [1],
    }  # fmt: skip
    emit.nodes.append(ir.node("Scan", [memory, most, *inputs], attributes, outputs=made, name=name))
    rows = emit.op("Expand", made[1], emit.constant([1, 1, size_at(given.key, 3), 1]))
    return made[2], emit.op("Concat", made[0], rows, axis=-1)
