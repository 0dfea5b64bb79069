"""Experts that calibration hardly reached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from .base import Context, GraphPass, Note, PassResult
from .edit import is_call
from .plan import LinearPlan
from .sites import SHAPE_ONLY, Linear, linears

aten = torch.ops.aten
FEW_TOKENS = 128


class _Reached:
    """How many tokens are not zero in all channels."""

    def __init__(self) -> None:
        self.tokens = self.all = 0

    def update(self, x: torch.Tensor) -> None:
        """Take in x, float [tokens, K]."""
        self.tokens += int((x != 0).any(-1).sum())
        self.all += len(x)


@dataclass(frozen=True)
class CountChoices(GraphPass):
    """Changes nothing, and notes the linears of experts that few calibration tokens chose.

    What such a linear reads is zero for every token that did not choose its expert, so its statistics are those of few
    tokens: scales, Hessians and ranges of it say little.

    Attributes:
        plan: by linear name.
    """

    plan: Mapping[str, LinearPlan]

    def works_on(self, module: GraphModule) -> bool:
        return bool(self._read_by_choice(module))

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {linear.input: _Reached for linear in self._read_by_choice(module)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for linear in self._read_by_choice(module):
            seen = context.statistics[linear.input]
            if seen.tokens < FEW_TOKENS:
                what = f"{seen.tokens} of {seen.all} calibration tokens chose its expert, fewer than {FEW_TOKENS}"
                result.skipped.append(Note(linear.name, what))
        return result

    def _read_by_choice(self, module: GraphModule) -> list[Linear]:
        """Linears to be quantized that read something times a token's share of an expert."""
        return [
            linear
            for linear in linears(module.graph)
            if linear.name in self.plan
            and self.plan[linear.name].scheme is not None
            and is_call(linear.input, aten.mul.Tensor)
            and any(map(_is_share, linear.input.args))
        ]


def _is_share(value) -> bool:
    while is_call(value, aten.slice.Tensor, *SHAPE_ONLY):
        value = value.args[0]
    return is_call(value, torch.ops.qexport.expert_shares.default)
