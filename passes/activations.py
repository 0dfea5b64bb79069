"""Activation quantization: where a planned linear reads a value, quantize and dequantize it in between."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ..numerics.formats import ActivationFormat
from ..numerics.grid import static_scale
from ..numerics.observers import AbsmaxObserver, MseObserver, PercentileObserver
from .base import Context, GraphPass, Note, PassResult
from .edit import add_tensor, call, finish, shape_of
from .plan import LinearPlan

aten = torch.ops.aten
ops = torch.ops.qexport


@dataclass(frozen=True)
class QuantizeActivations(GraphPass):
    """Insert static per-tensor or dynamic per-token quantization in front of quantized linears.

    Runs after the weights are quantized, so that ranges are those of the model that is deployed. Linears that read one
    value share its quantization.

    Attributes:
        plan: by linear name; linears whose scheme has no activation format are left alone.
        observer: how a static range is chosen: "absmax", "percentile" or "mse".
        percentile: of |x|, for the percentile observer.
    """

    plan: Mapping[str, LinearPlan]
    observer: str = "absmax"
    percentile: float = 99.99

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {v: lambda fmt=fmt: self._observer(fmt) for v, fmt in self._sites(module) if fmt.kind == "static"}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for (value, fmt), products in self._sites(module).items():
            if fmt.kind == "static":
                absmax = context.statistics[value].absmax()
                new = _static(module.graph, value, products, static_scale(absmax, fmt))
                note = Note(value.name, "static per-tensor", {"absmax": absmax})
            else:
                new = _per_token(module.graph, value, products, fmt)
                note = Note(value.name, "dynamic per-token")
            for product in products:
                product.replace_input_with(value, new)
            result.changed.append(note)
        finish(module)
        return result

    def _observer(self, fmt: ActivationFormat):
        if self.observer == "absmax":
            return AbsmaxObserver()
        return PercentileObserver(self.percentile) if self.observer == "percentile" else MseObserver(fmt)

    def _sites(self, module: GraphModule) -> dict[tuple[Node, ActivationFormat], list[Node]]:
        sites: dict[tuple[Node, ActivationFormat], list[Node]] = {}
        for node in module.graph.nodes:
            plan = self.plan.get(node.meta.get("linear", ""))
            if plan is not None and plan.scheme is not None and plan.scheme.activation is not None:
                sites.setdefault((node.args[0], plan.scheme.activation), []).append(node)
        return sites


def _static(graph: Graph, value: Node, products: list[Node], scale: float) -> Node:
    with graph.inserting_before(products[0]):
        step = add_tensor(graph, f"{products[0].meta['linear']}.input_scale", torch.tensor(scale, dtype=torch.float32))
        codes = call(graph, ops.quantize_linear.default, (value, step, 0, True), like=value, dtype=torch.int8)
        return call(graph, ops.dequantize_linear.default, (codes, step, None, 0, 0, 8), like=value)


def _per_token(graph: Graph, value: Node, products: list[Node], fmt: ActivationFormat) -> Node:
    with graph.inserting_before(products[0]):
        one = add_tensor(graph, f"{products[0].meta['linear']}.unit_scale", torch.ones((), dtype=torch.float32))
        scale = call(graph, ops.token_scale.default, (value, fmt.qmax), like=value, shape=(*shape_of(value)[:-1], 1))
        ratio = call(graph, aten.div.Tensor, (value, scale), like=value)
        codes = call(graph, ops.quantize_linear.default, (ratio, one, 0, True), like=value, dtype=torch.int8)
        centred = call(graph, ops.dequantize_linear.default, (codes, one, None, 0, 0, 8), like=value)
        return call(graph, aten.mul.Tensor, (centred, scale), like=value)
