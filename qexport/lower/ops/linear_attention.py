"""Linear attention with decay and the gated delta rule as ONNX Runtime's LinearAttention."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.schema import Arguments
from ...graph.views import size_at
from ..emitter import Emitter, unsupported
from ..registry import translates

ops = torch.ops.qexport


@translates(ops.gated_linear_attention.default)
def _gated_linear_attention(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _linear_attention(emit, node, given, "gated")


@translates(ops.gated_delta_rule.default)
def _gated_delta_rule(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return _linear_attention(emit, node, given, "gated_delta", given.beta)


def _linear_attention(emit: Emitter, node: Node, given: Arguments, rule: str, *more: Node) -> tuple[ir.Value, ...]:
    """Heads lie side by side in what the kernel reads and makes, and are an axis of their own here."""
    if not emit.operators.contrib:
        raise unsupported(node, "in ONNX's own operators")
    dtype, heads = dtype_of(given.value), size_at(given.value, 2)
    rows = emit.constant([0, 0, -1])
    parts = ((x, emit.get(x, dtype)) for x in (given.query, given.key, given.value, given.decay))
    packed = [emit.op("Reshape", value, rows) if len(shape_of(x)) > 3 else value for x, value in parts]
    out, state = emit.several(
        2, "LinearAttention", *packed[:3], emit.get(given.past), packed[3], *(emit.get(x, dtype) for x in more),
        domain="com.microsoft", q_num_heads=size_at(given.query, 2), kv_num_heads=heads, update_rule=rule,
        scale=float(given.scale),
    )  # fmt: skip
    return emit.op("Reshape", out, emit.constant([0, 0, heads, size_at(given.value, 3)])), state
