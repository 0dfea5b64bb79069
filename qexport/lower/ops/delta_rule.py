"""The gated delta rule as ONNX Runtime's LinearAttention."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import size_at
from ..emitter import Emitter, unsupported
from ..registry import translates


@translates(torch.ops.qexport.gated_delta_rule.default)
def _gated_delta_rule(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    if not emit.operators.contrib:
        raise unsupported(node, "in operators of ONNX alone")
    dtype, heads = dtype_of(given.value), size_at(given.value, 2)
    rows = emit.constant([0, 0, -1])
    packed = [emit.op("Reshape", emit.get(x, dtype), rows) for x in (given.query, given.key, given.value)]
    out, state = emit.several(
        2, "LinearAttention", *packed, emit.get(given.past), emit.get(given.decay, dtype), emit.get(given.beta, dtype),
        domain="com.microsoft", q_num_heads=heads, kv_num_heads=heads, update_rule="gated_delta",
        scale=float(given.scale),
    )  # fmt: skip
    return emit.op("Reshape", out, emit.constant([0, 0, heads, size_at(given.value, 3)])), state
