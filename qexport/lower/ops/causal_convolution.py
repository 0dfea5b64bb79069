"""Causal convolutions with a state: an operator of ONNX Runtime's own, or a convolution behind a Concat."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of
from ...graph.schema import Arguments
from ...graph.views import size_at
from ..emitter import Emitter
from ..registry import translates


@translates(torch.ops.qexport.causal_convolution.default)
def _causal_convolution(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    dtype, width = dtype_of(given.x), size_at(given.past, 2)
    x, weight, bias, past = (emit.get(part, dtype) for part in (given.x, given.weight, given.bias, given.past))
    if emit.operators.contrib:
        return emit.several(2, "CausalConvWithState", x, weight, bias, past, domain="com.microsoft", ndim=1)
    whole = emit.op("Concat", past, x, axis=2)
    end = emit.op("Slice", whole, emit.constant([-width]), emit.constant([2**62]), emit.constant([2]))
    return emit.op("Conv", whole, weight, bias, group=size_at(given.weight, 0)), end
