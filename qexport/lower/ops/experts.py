"""Mixtures of experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...numerics.packing import pack_rows
from ...passes.edit import dtype_of, shape_of
from ...runtime.manifest import QMOE
from ..emitter import Emitter

ops = torch.ops.qexport


def _expert_shares(emit: Emitter, node: Node):
    index, weights, experts = node.args
    last, every = emit.constant([-1]), emit.constant(list(range(experts)))
    chosen = emit.op("Equal", emit.op("Unsqueeze", emit.get(index), last), every)
    given = emit.op("Unsqueeze", emit.get(weights), last)
    spread = emit.op("Where", chosen, given, emit.constant(0.0, dtype_of(node)))
    return emit.op("ReduceSum", spread, emit.constant([1]), keepdims=0)


@dataclass(frozen=True)
class _Side:
    """The same linear of all experts: its tensors, and how they are stored.

    Attributes:
        name: of its tensors in the file.
        order: rows of the weight [N, K] in the order of the file; None: as they are.
    """

    name: str
    codes: Sequence[Node]
    scales: Sequence[Node]
    zeros: Sequence[Node]
    biases: Sequence[Node]
    bits: int
    group: int
    block: int
    order: torch.Tensor | None = None

    def inputs(self, emit: Emitter) -> tuple:
        """(codes [E, N, K * bits / 8], scales [E, N, blocks], biases [E, N] or None, zero points or None)."""
        (k, n), bits, count = shape_of(self.codes[0]), self.bits, len(self.codes)
        blocks = k // self.block
        offset = 0 if self.zeros else 2 ** (bits - 1)  # what a kernel takes off where there are none

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t.t() if self.order is None else t.t()[self.order]

        def spread(t: torch.Tensor) -> torch.Tensor:
            return rows(t).repeat_interleave(self.group // self.block, dim=1)

        def pack(t: torch.Tensor) -> torch.Tensor:
            return pack_rows(rows(t).contiguous().view(torch.uint8) + offset, bits)

        def biases(t: torch.Tensor) -> torch.Tensor:
            return t if self.order is None else t[self.order]

        def stacked(what: str, parts: Sequence[Node], shape: Sequence[int], dtype: torch.dtype, make):
            return emit.stacked(f"{self.name}.{what}", parts, (count, *shape), dtype, make) if parts else None

        def zeros(t: torch.Tensor) -> torch.Tensor:
            return pack_rows(spread(t), bits)

        return (
            stacked("codes", self.codes, (n, k * bits // 8), torch.uint8, pack),
            stacked("scales", self.scales, (n, blocks), dtype_of(self.scales[0]), spread),
            stacked("bias", self.biases, (n,), dtype_of(self.scales[0]), biases),
            stacked("zero_points", self.zeros, (n, -(-blocks * bits // 8)), torch.uint8, zeros),
        )  # fmt: skip


def _quantized_experts(emit: Emitter, node: Node):
    x, scores, shares, k, *tensors = node.args[:12]
    bits, up_group, down_group, block, activation, interleaved, alpha, beta, limit, rounds = node.args[12:]
    name, order = node.meta["experts"].name, None
    if activation == "swiglu" and not interleaved:  # the only order that the CPU provider takes
        order = torch.arange(shape_of(tensors[0][0])[1]).view(2, -1).t().reshape(-1)
    up = _Side(f"{name}.up", *tensors[:4], bits, up_group, block, order).inputs(emit)
    down = _Side(f"{name}.down", *tensors[4:], bits, down_group, block).inputs(emit)
    swiglu = {
        "swiglu_fusion": 1, "activation_alpha": float(alpha), "activation_beta": float(beta),
        "swiglu_limit": None if limit == float("inf") else float(limit),
    }  # fmt: skip
    return emit.op(
        QMOE, emit.get(x), emit.get(scores), *up[:3], *down[:3], None, None, None, up[3], down[3], None,
        emit.get(shares), domain="com.microsoft", name=name, k=k, activation_type=activation, expert_weight_bits=bits,
        block_size=block, normalize_routing_weights=0, weights_prepacked=0, accuracy_level=4 if rounds else 1,
        **(swiglu if activation == "swiglu" else {}),
    )  # fmt: skip


TRANSLATIONS = {ops.expert_shares.default: _expert_shares, ops.quantized_experts.default: _quantized_experts}
