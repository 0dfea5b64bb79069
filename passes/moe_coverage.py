"""Experts that calibration hardly reached."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .. import ranks
from ..graph.edit import is_call
from ..graph.sites import SHAPE_ONLY, Linear, linears
from ..graph.views import operand
from ..plan.linear_plan import LinearPlan
from .base import Context, GraphPass, PassResult, SiteRecord

aten = torch.ops.aten
_BETWEEN = (  # the linears of an expert
    operator.getitem, aten.chunk.default, aten.split.Tensor, aten.slice.Tensor, aten.silu.default, aten.gelu.default,
    aten.relu.default, aten.sigmoid.default, aten.clamp.default, aten.mul.Tensor, aten.add.Tensor,
)  # fmt: skip
FEW_TOKENS = 128


def of_experts(graph: Graph) -> list[Linear]:
    """The linears of mixtures of experts: what they make, or what they read, is multiplied by a token's share."""
    return [found for found in linears(graph) if _reads_share(found.input) or _meets_share(found.node)]


def _meets_share(node: Node) -> bool:
    """Whether a value is multiplied by a share before another linear reads it."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if _reads_share(user):
                return True
            if user not in seen and is_call(user, *_BETWEEN):
                seen.add(user)
                waiting.append(user)
    return False


def _reads_share(node: Node) -> bool:
    return is_call(node, aten.mul.Tensor) and any(map(_is_share, node.args))


class _Reached:
    """How many tokens are not zero in all channels."""

    def __init__(self) -> None:
        self.tokens = self.all = 0

    def update(self, x: torch.Tensor) -> None:
        """Take in x, float [tokens, K]."""
        self.tokens += int((x != 0).any(-1).sum())
        self.all += len(x)

    def across(self) -> None:
        """See `Statistic`."""
        counts = ranks.gather((self.tokens, self.all))
        self.tokens, self.all = (sum(column) for column in zip(*counts, strict=True))


@dataclass(frozen=True)
class CountChoices(GraphPass):
    """Changes nothing, and notes the linears of experts that few calibration tokens chose.

    What such a linear reads is zero for every token that did not choose its expert, so its statistics are those of few
    tokens: scales, Hessians and ranges of it say little.

    Attributes:
        plan: by linear name.
    """

    plan: Mapping[str, LinearPlan]
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return bool(self._read_by_choice(module))

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        return {linear.input: _Reached for linear in self._read_by_choice(module)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for linear in self._read_by_choice(module):
            seen = context.statistics[linear.input]
            if seen.tokens < FEW_TOKENS:
                what = f"{seen.tokens} of {seen.all} calibration tokens chose its expert, fewer than {FEW_TOKENS}"
                result.skipped.append(SiteRecord(linear.name, what))
        return result

    def _read_by_choice(self, module: GraphModule) -> list[Linear]:
        """Linears to be quantized that read something times a token's share of an expert."""
        return [
            linear
            for linear in linears(module.graph)
            if linear.name in self.plan and self.plan[linear.name].scheme is not None and _reads_share(linear.input)
        ]


def _is_share(value: object) -> bool:
    while is_call(value, aten.slice.Tensor, *SHAPE_ONLY):
        value = operand(value)
    return is_call(value, torch.ops.qexport.expert_shares.default)
