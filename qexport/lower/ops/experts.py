"""Mixtures of experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.fx import Node

from ...artifact.manifest import QMOE
from ...graph.edit import dtype_of
from ...graph.meta import Meta
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...quant.packing import pack_rows
from ..emitter import Attribute, Emitter
from ..registry import translates

ops = torch.ops.qexport


@translates(ops.expert_shares.default)
def _expert_shares(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    last, every = emit.constant([-1]), emit.constant(list(range(given.experts)))
    chosen = emit.op("Equal", emit.op("Unsqueeze", emit.get(given.index), last), every)
    weights = emit.op("Unsqueeze", emit.get(given.weights), last)
    spread = emit.op("Where", chosen, weights, emit.constant(0.0, dtype_of(node)))
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

    def inputs(self, emit: Emitter) -> tuple[ir.Value | None, ...]:
        """(codes [E, N, K * bits / 8], scales [E, N, blocks], biases [E, N] or None, zero points or None)."""
        (k, n), bits, count = sizes_of(self.codes[0]), self.bits, len(self.codes)
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

        def stacked(
            what: str, parts: Sequence[Node], shape: Sequence[int], dtype: torch.dtype,
            make: Callable[[torch.Tensor], torch.Tensor],
        ) -> ir.Value | None:  # fmt: skip
            return emit.stacked(f"{self.name}.{what}", parts, (count, *shape), dtype, make) if parts else None

        def zeros(t: torch.Tensor) -> torch.Tensor:
            return pack_rows(spread(t), bits)

        return (
            stacked("codes", self.codes, (n, k * bits // 8), torch.uint8, pack),
            stacked("scales", self.scales, (n, blocks), dtype_of(self.scales[0]), spread),
            stacked("bias", self.biases, (n,), dtype_of(self.scales[0]), biases),
            stacked("zero_points", self.zeros, (n, -(-blocks * bits // 8)), torch.uint8, zeros),
        )  # fmt: skip


@translates(ops.quantized_experts.default)
def _quantized_experts(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    name, order, bits, block = node.meta[Meta.EXPERTS].name, None, given.bits, given.block_size
    if given.activation == "swiglu" and not given.interleaved:  # the only order that the CPU provider takes
        order = torch.arange(sizes_of(given.up_codes[0])[1]).view(2, -1).t().reshape(-1)
    up = _Side(
        f"{name}.up", given.up_codes, given.up_scales, given.up_zeros, given.up_biases, bits, given.up_group, block,
        order,
    ).inputs(emit)  # fmt: skip
    down = _Side(
        f"{name}.down", given.down_codes, given.down_scales, given.down_zeros, given.down_biases, bits,
        given.down_group, block,
    ).inputs(emit)  # fmt: skip
    swiglu: dict[str, Attribute] = {}
    if given.activation == "swiglu":
        swiglu = {
            "swiglu_fusion": 1, "activation_alpha": float(given.alpha), "activation_beta": float(given.beta),
            "swiglu_limit": None if given.limit == float("inf") else float(given.limit),
        }  # fmt: skip
    return emit.op(
        QMOE, emit.get(given.x), emit.get(given.scores), *up[:3], *down[:3], None, None, None, up[3], down[3], None,
        emit.get(given.shares), domain="com.microsoft", name=name, k=given.k, activation_type=given.activation,
        expert_weight_bits=bits, block_size=block, normalize_routing_weights=0, weights_prepacked=0,
        accuracy_level=4 if given.rounds else 1, more=swiglu,
    )  # fmt: skip
