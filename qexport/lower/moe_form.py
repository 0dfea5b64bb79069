"""A mixture of experts, as far as a kernel asks."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ..graph.edit import is_call
from ..quant.packing import stored_block

INF = float("inf")
# What QMoE calls the formats of small floats that the published package has kernels for.
FLOATS = {"mxfp4": "fp4", "nvfp4": "nvfp4"}


@dataclass(frozen=True)
class Gate:
    """What stands between the two linears of an expert, as `ops.experts.gate` takes it."""

    activation: str
    interleaved: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = INF


@dataclass(frozen=True)
class ExpertWeights:
    """How the weight of a linear is quantized: bits of a code, input features to a scale, and zero points or none.

    Attributes:
        floats: name of the format, of codes that are floats.
    """

    bits: int
    group: int
    zero_points: bool
    floats: str = ""

    def __str__(self) -> str:
        if self.floats:
            return self.floats
        return f"{self.bits} bits in groups of {self.group}{' with zero points' if self.zero_points else ''}"


@dataclass(frozen=True)
class MoeForm:
    """A mixture of experts, as far as a kernel asks.

    Attributes:
        hidden, inner: input features of the first and of the second linear of an expert.
        up, down: how their weights are quantized.
    """

    hidden: int
    inner: int
    up: ExpertWeights
    down: ExpertWeights
    gate: Gate

    @property
    def block_size(self) -> int:
        """Input features to a scale in the file: both linears have the same."""
        if self.up.floats:
            return self.up.group
        return min(stored_block(side.bits, side.group) for side in (self.up, self.down))

    def why_dense(self) -> str:
        """Why no provider can run it; empty where one may."""
        bits = {self.up.bits, self.down.bits}
        if len(bits) > 1 or self.up.floats != self.down.floats:
            return f"its linears have weights of {self.up} and of {self.down}"
        if self.up.floats and self.up.floats not in FLOATS:
            return f"its weights are {self.up.floats}, and QMoE takes {' and '.join(FLOATS)}"
        if not bits <= {4, 8}:
            return f"its weights have {self.up.bits} bits, and QMoE takes 4 or 8"
        if self.hidden % self.up.group or self.inner % self.down.group:
            return f"{self.hidden} and {self.inner} input features do not divide into whole groups"
        return ""


def mixtures(graph: Graph) -> list[Node]:
    """The mixtures that are one node."""
    return [node for node in graph.nodes if is_call(node, torch.ops.qexport.quantized_experts.default)]
