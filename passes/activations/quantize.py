"""Activation quantization: where a planned linear reads a value, quantize and dequantize it in between."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from ...graph.edit import add_tensor, call, finish, shape_of
from ...graph.meta import Meta
from ...graph.views import operand
from ...plan.linear_plan import LinearPlan
from ...quant.affine import static_scale
from ...quant.formats import ActivationFormat
from ...quant.observers import MseObserver, PercentileObserver
from ...quant.token_clip import TokenClip
from ...quant.zero_fraction import RangeAndKernel, TokenKernel
from ..base import Context, GraphPass, PassResult, PassState, RowScale, SiteRecord

aten = torch.ops.aten
ops = torch.ops.qexport

# A value, its format, and its scale where that is given.
_Site = tuple[Node, ActivationFormat, float | None]


@dataclass(frozen=True)
class QuantizeActivations(GraphPass):
    """Insert static per-tensor or dynamic per-token quantization in front of quantized linears.

    Runs after the weights are quantized, so that ranges are those of the model that is deployed. Linears that read one
    value share its quantization.

    Attributes:
        plan: by linear name; linears whose scheme has no activation format are left alone.
        observer: how a static range is chosen: "absmax", "percentile" or "mse".
        percentile: of |x|, for the percentile observer.
        measure: whether calibration data is there to measure the quantization kernel of dynamic sites too.
        only_kernel: do not quantize, only make zero what quantization would.
        cross_alpha: CrossQuant as it was published: dynamic steps t^alpha c^(1-alpha) / qmax with the channels' largest
            magnitudes taken over the tokens of the call, and a float matmul. For comparison: padding counts as tokens,
            and a call of one token is rounded by itself alone. None: not so.
        token_clip: the share of a token's largest magnitude that its range reaches to, where its step is dynamic and no
            method has decided that; "search": of each value the share with the least squared error.
    """

    plan: Mapping[str, LinearPlan]
    observer: str = "absmax"
    percentile: float = 99.99
    measure: bool = False
    only_kernel: bool = False
    cross_alpha: float | None = None
    token_clip: float | Literal["search"] = 1.0
    preserves_values: ClassVar[bool] = True

    def wanted(self, module: GraphModule, handover: PassState) -> dict[Node, Callable[[], Any]]:
        wanted: dict[Node, Callable[[], Any]] = {}
        for value, fmt, given in self._sites(module, handover):
            if given is not None:
                continue
            if fmt.kind == "static":
                wanted[value] = partial(self._observer, fmt)
            elif self.measure:
                row = handover.row_scales.get(value)
                wanted[value] = partial(self._kernel, fmt, row)
        return wanted

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        graph = module.graph
        for (value, fmt, given), products in self._sites(module, context.handover).items():
            seen, row = context.statistics.get(value), context.handover.row_scales.get(value)
            with graph.inserting_before(products[0]):
                if given is None:
                    new, measured = self._rounded(graph, value, fmt, products, seen, row)
                else:
                    new, measured = _with_scale(graph, value, fmt, products, given), {"scale": given}
            data = {"bits": fmt.bits, **({"numbers": "e4m3"} if fmt.e4m3 else {}), **measured}
            for product in products:
                product.replace_input_with(value, new)
            what = "static per-tensor" if fmt.kind == "static" else "dynamic per-token"
            if given is not None:
                what = f"{what}, with the scale of the checkpoint"
            if row is not None:
                what = f"{what}, row scale t^{row.alpha:g}"
            elif self.cross_alpha is not None and fmt.kind == "dynamic":
                what = f"dynamic, t^{self.cross_alpha:g} c^{1 - self.cross_alpha:g}, float matmul"
            result.changed.append(
                SiteRecord(value.name, what, {**data, "linears": [p.meta[Meta.LINEAR] for p in products]})
            )
        finish(module)
        return result

    def _rounded(
        self, graph: Graph, value: Node, fmt: ActivationFormat, products: list[Node], seen: Any, row: RowScale | None
    ) -> tuple[Node, dict[str, Any]]:
        """A value as products read it, and what its statistic says; seen: None where there is none, of dynamic ones."""
        if fmt.kind == "static":
            absmax = seen.absmax()
            scale = static_scale(absmax, fmt)
            twice = 2 * fmt.zero_below * scale  # half of it becomes zero
            if not self.only_kernel:
                return _with_scale(graph, value, fmt, products, scale), {"absmax": absmax, **seen.kernel(twice)}
            rounded = _without_kernel(graph, value, _step(graph, products, twice))
            return rounded, {"absmax": absmax, **seen.kernel(twice)}
        measured = {} if seen is None else seen.kernel()
        if self.cross_alpha is not None:
            return _crossed(graph, value, fmt, self.cross_alpha), measured
        step = _token_step(graph, value, products, fmt, row)
        if self.only_kernel:
            return _without_kernel(graph, value, step), measured
        clip = self._clip(seen, row)
        if clip == 1:
            return _per_token(graph, value, products, step), measured
        step = call(graph, aten.mul.Tensor, (step, clip), like=step)
        return _per_token(graph, value, products, step, fmt.qmax), {"clip": clip, **measured}

    def _clip(self, seen: Any, row: RowScale | None) -> float:
        """The share of a token's largest magnitude that its range reaches to."""
        if row is not None:
            return 1.0
        if self.token_clip == "search":
            return seen.clip() if isinstance(seen, TokenClip) else 1.0
        return self.token_clip

    def _observer(self, fmt: ActivationFormat) -> RangeAndKernel:
        if self.observer == "absmax":
            return RangeAndKernel()
        other = PercentileObserver(self.percentile) if self.observer == "percentile" else MseObserver(fmt)
        return RangeAndKernel(other)

    def _kernel(self, fmt: ActivationFormat, row: RowScale | None) -> TokenKernel:
        if self.cross_alpha is not None:
            return TokenKernel(fmt, alpha=self.cross_alpha, crossed=True)
        if row is not None:
            return TokenKernel(fmt, row.factors, row.alpha)
        return TokenClip(fmt) if self.token_clip == "search" else TokenKernel(fmt)

    def _sites(self, module: GraphModule, handover: PassState) -> dict[_Site, list[Node]]:
        sites: dict[_Site, list[Node]] = {}
        for node in module.graph.nodes:
            name = node.meta.get(Meta.PLANE_OF) or node.meta.get(Meta.LINEAR, "")
            plan = self.plan.get(name)
            if plan is not None and plan.activation is not None:
                value = operand(node)
                fmt = handover.formats.get(value, plan.activation)
                sites.setdefault((value, fmt, handover.input_scales.get(name)), []).append(node)
        return sites


def round_per_token(graph: Graph, value: Node, products: list[Node]) -> None:
    """Let products read `value` rounded to 8 bits with one step per token, in place."""
    fmt = ActivationFormat("dynamic")
    with graph.inserting_before(products[0]):
        rounded = _per_token(graph, value, products, _token_step(graph, value, products, fmt, None))
    for product in products:
        product.replace_input_with(value, rounded)


def _token_step(graph: Graph, value: Node, products: list[Node], fmt: ActivationFormat, row: RowScale | None) -> Node:
    shape = (*shape_of(value)[:-1], 1)
    if row is None:
        return call(graph, ops.token_scale.default, (value, fmt.qmax), like=value, shape=shape)
    factors = add_tensor(graph, f"{products[0].meta[Meta.LINEAR]}.channel_factor", row.factors.clone())
    whole = call(graph, aten.mul.Tensor, (value, factors), like=value)
    paper = call(graph, ops.token_scale.default, (whole, fmt.qmax, row.alpha), like=value, shape=shape)
    # A channel may exceed what it was calibrated with; the paper, which measures channels as it runs, never clips.
    enough = call(graph, ops.token_scale.default, (value, fmt.qmax), like=value, shape=shape)
    return call(graph, aten.maximum.default, (paper, enough), like=value, shape=shape)


def _with_scale(graph: Graph, value: Node, fmt: ActivationFormat, products: list[Node], scale: float) -> Node:
    return _static(graph, value, _step(graph, products, scale), fmt)


def _step(graph: Graph, products: list[Node], scale: float) -> Node:
    name = f"{products[0].meta[Meta.LINEAR]}.input_scale"
    return add_tensor(graph, name, torch.tensor(scale, dtype=torch.float32))


def _static(graph: Graph, value: Node, step: Node, fmt: ActivationFormat) -> Node:
    if fmt.e4m3:
        return call(graph, ops.round_e4m3.default, (value, step), like=value)
    if fmt.bits < 8:  # the 8-bit container does not saturate where the format does
        limit = float(fmt.qmax)
        ratio = call(graph, aten.div.Tensor, (value, step), like=value)
        clipped = call(graph, aten.clamp.default, (ratio, -limit, limit), like=value)
        value = call(graph, aten.mul.Tensor, (clipped, step), like=value)
    codes = call(graph, ops.quantize_linear.default, (value, step, 0, True), like=value, dtype=torch.int8)
    return call(graph, ops.dequantize_linear.default, (codes, step, None, 0, 0, 8), like=value)


def _per_token(graph: Graph, value: Node, products: list[Node], step: Node, limit: int | None = None) -> Node:
    """A value on a grid with one step per token; limit: the largest code, where values may go beyond."""
    one = add_tensor(graph, f"{products[0].meta[Meta.LINEAR]}.unit_scale", torch.ones((), dtype=torch.float32))
    ratio = call(graph, aten.div.Tensor, (value, step), like=value)
    if limit is not None:
        ratio = call(graph, aten.clamp.default, (ratio, -float(limit), float(limit)), like=value)
    codes = call(graph, ops.quantize_linear.default, (ratio, one, 0, True), like=value, dtype=torch.int8)
    centred = call(graph, ops.dequantize_linear.default, (codes, one, None, 0, 0, 8), like=value)
    return call(graph, aten.mul.Tensor, (centred, step), like=value)


def _crossed(graph: Graph, value: Node, fmt: ActivationFormat, alpha: float) -> Node:
    """CrossQuant (arXiv 2410.07505) on floats: round(x / step) * step with a step for every element."""
    *outer, tokens, features = shape_of(value)
    size = call(graph, aten.abs.default, (value,), like=value)
    token = call(graph, aten.amax.default, (size, [-1], True), like=value, shape=(*outer, tokens, 1))
    channel = call(graph, aten.amax.default, (size, [-2], True), like=value, shape=(*outer, 1, features))
    token = call(graph, aten.pow.Tensor_Scalar, (token, alpha), like=token)
    channel = call(graph, aten.pow.Tensor_Scalar, (channel, 1.0 - alpha), like=channel)
    step = call(graph, aten.mul.Tensor, (token, channel), like=value)
    step = call(graph, aten.mul.Tensor, (step, 1.0 / fmt.qmax), like=value)
    step = call(graph, aten.clamp_min.default, (step, 1e-8), like=value)
    ratio = call(graph, aten.div.Tensor, (value, step), like=value)
    return call(graph, aten.mul.Tensor, (call(graph, aten.round.default, (ratio,), like=value), step), like=value)


def _without_kernel(graph: Graph, value: Node, step: Node) -> Node:
    """x where it is at least half a step, else 0."""
    half = call(graph, aten.mul.Tensor, (step, 0.5), like=step)
    size = call(graph, aten.abs.default, (value,), like=value)
    kept = call(graph, aten.ge.Tensor, (size, half), like=value, dtype=torch.bool)
    return call(graph, aten.where.ScalarOther, (kept, value, 0.0), like=value)
