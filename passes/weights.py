"""Weight quantization: round to nearest, or GPTQ with a Hessian of the inputs that the quantized model really sees."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..errors import QExportError
from ..numerics.formats import PER_CHANNEL, PER_TENSOR
from ..numerics.gptq import HessianStatistic, gptq
from ..numerics.grid import QuantizedWeight, encode, quantize_weight, search_clip
from .base import Context, GraphPass, Note, PassResult
from .edit import add_tensor, call, finish, get_tensor, shape_of
from .plan import LinearPlan
from .sites import Linear, linears

aten = torch.ops.aten


@dataclass(frozen=True)
class RoundToNearest(GraphPass):
    """Nearest code, scales from the range of each group (or clipped where that lowers the squared error).

    Attributes:
        plan: by linear name; linears without a scheme stay as they are.
        clip_search: choose each group's clipping ratio by its squared error.
    """

    plan: Mapping[str, LinearPlan]
    clip_search: bool = False

    def call(self, module: GraphModule, context: Context) -> PassResult:
        def quantize(linear: Linear, w: torch.Tensor) -> QuantizedWeight:
            fmt = self.plan[linear.name].scheme.weight
            if not self.clip_search:
                return quantize_weight(w, fmt)
            scale, zero_point = search_clip(w, fmt)
            return QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)

        return _quantize_all(module, self.plan, quantize)


@dataclass(frozen=True)
class GPTQ(GraphPass):
    """Column by column, each column's rounding error pushed onto the columns not yet rounded (arXiv 2210.17323).

    Attributes:
        plan: by linear name.
        damp: share of the mean diagonal added to the Hessian.
        act_order: columns with the largest diagonal first; scales stay with the original groups.
        token_norm_power: tokens are divided by their norm to this power before they enter the Hessian: a few tokens
            of huge norm (attention sinks) otherwise own it.
        clip_search: scales by the squared error weighted with the diagonal, not by the range.
    """

    plan: Mapping[str, LinearPlan]
    damp: float = 0.01
    act_order: bool = True
    token_norm_power: float = 1.0
    clip_search: bool = False

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {
            linear.input: lambda: HessianStatistic(
                "token_norm" if self.token_norm_power else "none", self.token_norm_power or 1.0
            )
            for linear in linears(module.graph)
            if _planned(self.plan, linear)
        }

    def call(self, module: GraphModule, context: Context) -> PassResult:
        hessians = {value: statistic.value() for value, statistic in context.statistics.items()}

        def quantize(linear: Linear, w: torch.Tensor) -> QuantizedWeight:
            fmt, hessian = self.plan[linear.name].scheme.weight, hessians[linear.input]
            if not hessian.any():  # no calibration token reached it, as can happen to an expert
                return quantize_weight(w, fmt)
            return gptq(w, hessian, fmt, damp=self.damp, act_order=self.act_order, clip_search=self.clip_search)

        return _quantize_all(module, self.plan, quantize)


def _planned(plan: Mapping[str, LinearPlan], linear: Linear) -> bool:
    return linear.name in plan and plan[linear.name].scheme is not None


def _quantize_all(module: GraphModule, plan: Mapping[str, LinearPlan], quantize) -> PassResult:
    result = PassResult()
    for linear in linears(module.graph):
        if not _planned(plan, linear):
            why = plan[linear.name].reason if linear.name in plan else "not in the plan"
            result.skipped.append(Note(linear.name, why))
            continue
        try:
            quantized = quantize(linear, get_tensor(module, linear.weight))
        except QExportError as error:
            error.place = error.place or linear.name
            raise type(error)(error.message, place=linear.name, remedy=error.remedy) from error
        insert_weight(module, linear, quantized)
        result.changed.append(Note(linear.name, plan[linear.name].scheme.name))
    finish(module)
    return result


def insert_weight(module: GraphModule, linear: Linear, weight: QuantizedWeight) -> Node:
    """Replace linear(x, W, b) by matmul(x, dequantize(codes [K, N], scale)) + b, the layout that ONNX Runtime fuses.

    Returns:
        The node of the result.
    """
    graph, node, fmt = module.graph, linear.node, weight.format
    per_group = fmt.group_size not in (PER_CHANNEL, PER_TENSOR)

    def layout(t: torch.Tensor) -> torch.Tensor:  # [N, G] as the operator wants it
        if fmt.group_size == PER_TENSOR:
            return t.reshape(())
        return t.t().contiguous() if per_group else t.reshape(-1)

    with graph.inserting_before(node):
        codes = add_tensor(graph, f"{linear.name}.weight_codes", weight.codes.t().contiguous())
        scale = add_tensor(graph, f"{linear.name}.weight_scale", layout(weight.scale))
        zero_point = None
        if weight.zero_point is not None:
            zero_point = add_tensor(graph, f"{linear.name}.weight_zero_point", layout(weight.zero_point))
        axis = 0 if per_group else 1
        dequantized = call(
            graph,
            torch.ops.qexport.dequantize_linear.default,
            (codes, scale, zero_point, axis, fmt.group_size if per_group else 0, fmt.bits),
            like=scale,
            shape=shape_of(codes),
        )
        product = result = call(graph, aten.matmul.default, (linear.input, dequantized), like=node)
        if linear.bias is not None:
            result = call(graph, aten.add.Tensor, (product, node.args[2]), like=node)
    product.meta["linear"] = linear.name
    result.meta["result_of"] = linear.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
