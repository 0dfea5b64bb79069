"""Convolutions in 8 bits: int8 weights per output channel, uint8 inputs and outputs with calibrated ranges.

The canonical form is what ONNX Runtime's CPU provider fuses to QLinearConv: dequantize (input, weight, int32 bias),
Conv, quantize. The output is quantized too, or the fusion would not happen.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .. import ranks
from ..errors import NumericsError
from ..graph.convolution_sites import convolutions, zero_padding
from ..graph.edit import add_tensor, call, finish, get_tensor, is_call, shape_of
from ..graph.meta import Meta
from ..graph.schema import rebind
from ..graph.views import Clamp, Convolution, operand, tensor_name
from ..plan.convolution_plan import ConvolutionPlan
from .base import Context, GraphPass, PassResult, PassState, SiteRecord

aten = torch.ops.aten
ops = torch.ops.qexport

# Only move or choose values: what goes in on a grid comes out on it.
_KEEP_GRID = (
    aten.max_pool1d.default, aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.permute.default, aten.transpose.int,
)  # fmt: skip


class MinMaxObserver:
    """The least and the largest value seen, and 0."""

    def __init__(self) -> None:
        self.low = self.high = 0.0

    def update(self, x: torch.Tensor) -> None:
        """Take in x, float of any shape; raises NumericsError on NaN or Inf."""
        if x.numel():
            low, high = (float(v) for v in torch.aminmax(x))
            if not math.isfinite(low) or not math.isfinite(high):
                raise NumericsError("NaN or Inf on the calibration data")
            self.low, self.high = min(self.low, low), max(self.high, high)

    def across(self) -> None:
        """See `Statistic`."""
        lows, highs = zip(*ranks.gather((self.low, self.high)), strict=True)
        self.low, self.high = min(lows), max(highs)

    def grid(self) -> tuple[float, int]:
        """(scale, zero point) of uint8 codes that cover it; 0 is a code. Steps of 1 where nothing but 0 was seen."""
        if self.low == self.high == 0:
            return 1.0, 128
        scale = max((self.high - self.low) / 255, 1e-8)
        return scale, round(-self.low / scale)


@dataclass(frozen=True)
class _Grid:
    """The uint8 grid of a value: nodes of scale and zero point, and the latter as a number."""

    scale: Node
    zero: Node
    zero_point: int


_Grids = dict[Node, tuple[_Grid, Node]]  # by value, its grid, and the value rounded to it


@dataclass(frozen=True)
class QuantizeConvolutions(GraphPass):
    """Put planned convolutions into the canonical 8-bit form.

    Convolutions that read one value share its quantization. A ReLU behind a convolution becomes part of the rounding.

    Attributes:
        plan: by name.
    """

    plan: Mapping[str, ConvolutionPlan]
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return bool(self._sites(module))

    def wanted(self, module: GraphModule, handover: PassState) -> dict[Node, Callable[[], Any]]:
        values = [v for conv in self._sites(module).values() for v in (_grid_source(_input(conv)), _end(conv))]
        return dict.fromkeys(values, MinMaxObserver)

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        grids: _Grids = {}
        # Where statistics were taken; nodes behind them are replaced while the graph changes.
        sites = {name: (conv, _grid_source(_input(conv)), _end(conv)) for name, conv in self._sites(module).items()}
        for name, (conv, source, end) in sites.items():
            scale = self._input(module, name, conv, context.statistics[source], grids)
            seen = context.statistics[end]
            self._output(module, name, conv, end, seen, grids)
            self._weights(module, name, conv, scale)
            result.changed.append(
                SiteRecord(name, "static per-tensor input and output", {"low": seen.low, "high": seen.high})
            )
        finish(module)
        return result

    def _input(self, module: GraphModule, name: str, conv: Node, seen: MinMaxObserver, grids: _Grids) -> Node:
        """Let the convolution read codes; returns the node of their scale."""
        graph, x, first = module.graph, _input(conv), operand(conv)
        reader = conv if x is first else first  # zeros that are added to codes are a code
        if x not in grids:
            known = grids.get(_grid_source(x))  # what comes off a grid lies on it still
            with graph.inserting_before(reader):
                grid = known[0] if known else _grid(graph, f"{name}.input", seen)
                grids[x] = grid, _rounded(graph, x, grid)
        grid, rounded = grids[x]
        reader.replace_input_with(x, rounded)
        return grid.scale

    def _output(
        self, module: GraphModule, name: str, conv: Node, end: Node, seen: MinMaxObserver, grids: _Grids
    ) -> None:
        """Round the result of the convolution to the range of the values at `end`, which clips it at most."""
        graph = module.graph
        with graph.inserting_before(end.next):
            grid = _grid(graph, f"{name}.output", seen)
            rounded = _rounded(graph, conv, grid)
        codes = operand(rounded)
        end.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not codes)
        conv.meta[Meta.CONVOLUTION] = name
        grids[rounded] = grid, rounded

    def _weights(self, module: GraphModule, name: str, conv: Node, input_scale: Node) -> None:
        graph, found = module.graph, Convolution.of(conv)
        weight, bias = get_tensor(module, tensor_name(found.weight)).float(), found.bias
        steps = (weight.flatten(1).abs().amax(1) / 127).clamp_min(1e-10)
        codes = torch.round(weight / steps.view(-1, *[1] * (weight.dim() - 1))).clamp(-127, 127).to(torch.int8)
        with graph.inserting_before(conv):
            scale = add_tensor(graph, f"{name}.weight_scale", steps)
            stored = add_tensor(graph, f"{name}.weight_codes", codes)
            arguments = (stored, scale, None, 0, 0, 8)
            rebind(conv, weight=call(graph, ops.dequantize_linear.default, arguments, like=found.weight))
            if bias is not None:
                fine = steps * get_tensor(module, tensor_name(input_scale))
                whole = torch.round(get_tensor(module, tensor_name(bias)).double() / fine.double())
                step = add_tensor(graph, f"{name}.bias_scale", fine)
                kept = add_tensor(graph, f"{name}.bias_codes", whole.clamp(-(2**31), 2**31 - 1).to(torch.int32))
                rebind(conv, bias=call(graph, ops.dequantize_linear.default, (kept, step, None, 0, 0, 8), like=bias))

    def _sites(self, module: GraphModule) -> dict[str, Node]:
        found = convolutions(module.graph)
        return {n: conv for n, conv in found.items() if n in self.plan and self.plan[n].scheme is not None}


def _input(conv: Node) -> Node:
    """What a convolution reads, without zeros that are added for it alone: see `lower.ops.convolution`."""
    found = Convolution.of(conv)
    alone = len(found.x.users) == 1 and zero_padding(found.x, len(shape_of(found.weight)) - 2) is not None
    return operand(found.x) if alone else found.x


def _grid_source(value: Node) -> Node:
    """The node whose values `value` holds, only moved or chosen from."""
    while is_call(value, *_KEEP_GRID):
        value = operand(value)
    return value


def _end(conv: Node) -> Node:
    """The value that is rounded behind a convolution: its own, or that of the clip which is its only reader."""
    user = next(iter(conv.users)) if len(conv.users) == 1 else None
    return user if user is not None and _clips_around_zero(user) else conv


def _clips_around_zero(node: Node) -> bool:
    """Whether a node clips to a range with 0 in it: rounding to the range of the clipped values does that by itself."""
    if (clip := Clamp.match(node)) is None:
        return is_call(node, aten.relu.default)
    if isinstance(clip.low, Node) or isinstance(clip.high, Node):
        return False
    return (clip.low is None or clip.low <= 0) and (clip.high is None or clip.high >= 0)


def _grid(graph: Graph, name: str, seen: MinMaxObserver) -> _Grid:
    scale, zero_point = seen.grid()
    step = add_tensor(graph, f"{name}_scale", torch.tensor(scale, dtype=torch.float32))
    zero = add_tensor(graph, f"{name}_zero_point", torch.tensor(zero_point, dtype=torch.uint8))
    return _Grid(step, zero, zero_point)


def _rounded(graph: Graph, value: Node, grid: _Grid) -> Node:
    arguments = (value, grid.scale, grid.zero_point, False)
    codes = call(graph, ops.quantize_linear.default, arguments, like=value, dtype=torch.uint8)
    return call(graph, ops.dequantize_linear.default, (codes, grid.scale, grid.zero, 0, 0, 8), like=value)
