"""A recurrence of gated channels as a Scan over the tokens."""

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ..emitter import ONNX_DTYPE, Emitter
from ..registry import translates


@translates(torch.ops.qexport.linear_recurrence.default)
def _linear_recurrence(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    dtype = dtype_of(given.x)
    kind = ir.TensorType(ONNX_DTYPE[dtype])
    gate, x, past = (emit.get(part, dtype) for part in (given.gate, given.x, given.past))
    name = emit.fresh(f"{node.name}/step")
    with emit.branch(f"{name}/") as nodes:
        state, *now = inner = [ir.Value(name=f"{name}/{part}", type=kind) for part in "sgx"]
        after = emit.op("Add", emit.op("Mul", now[0], state), now[1])
        handed_on = [after, emit.op("Identity", after)]  # a body's outputs are values of their own
    for result in handed_on:
        result.type = kind
    made = tuple(ir.Value(name=f"{name}:{i}") for i in range(2))
    attributes: dict[str, Any] = {
        "body": ir.Graph(inner, handed_on, nodes=nodes, name=name), "num_scan_inputs": 2,
        "scan_input_axes": [1, 1], "scan_output_axes": [1],
    }  # fmt: skip
    emit.nodes.append(ir.node("Scan", [past, gate, x], attributes, outputs=made, name=name))
    return made[1], made[0]
