"""Mixtures of experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from torch.fx import Node

from ...artifact.manifest import QMOE
from ...graph.edit import dtype_of
from ...graph.meta import Meta
from ...graph.schema import Arguments
from ...graph.views import sizes_of
from ...quant.packing import pack_rows
from ...quant.planes import plane_bits, split, tables, unsigned
from ..emitter import Attribute, Emitter
from ..moe_form import FLOATS
from ..registry import translates
from .quantized import joined_planes
from .small_floats import halved_scales, integers

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
        wholes: scales of whole weights; floats: name of the format of small floats, empty for integers.
        as_integers: these become 8-bit codes when the file is loaded.
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
    wholes: Sequence[Node] = ()
    floats: str = ""
    as_integers: bool = False

    def inputs(self, emit: Emitter) -> tuple[ir.Value | None, ...]:
        """(codes [E, N, K * bits / 8], scales [E, N, blocks], biases [E, N] or None, zero points or None)."""
        if self.floats:
            return self._of_floats(emit)
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

        def plane(few: int, place: int, t: torch.Tensor) -> torch.Tensor:
            return split(unsigned(rows(t).contiguous(), few, odd), few)[place]

        kept = {(node.meta.get(Meta.PLANES), node.meta.get(Meta.ODD, 0) > 0) for node in self.codes}
        few, odd = next(iter(kept)) if len(kept) == 1 else (None, False)
        if not isinstance(few, int):
            codes = stacked("codes", self.codes, (n, k * bits // 8), torch.uint8, pack)
        else:
            planes = [
                emit.stacked(f"{self.name}.codes.plane{place}", self.codes, (count, n, k * part // 8), torch.uint8,
                             partial(plane, few, place))
                for place, part in enumerate(plane_bits(few))
            ]  # fmt: skip
            codes = joined_planes(
                emit, planes, [count, n, k * bits // 8], tables(few, bits, not self.zeros, odd)
            )
        return (
            codes,
            stacked("scales", self.scales, (n, blocks), dtype_of(self.scales[0]), spread),
            stacked("bias", self.biases, (n,), dtype_of(self.scales[0]), biases),
            stacked("zero_points", self.zeros, (n, -(-blocks * bits // 8)), torch.uint8, zeros),
        )  # fmt: skip

    def _of_floats(self, emit: Emitter) -> tuple[ir.Value | None, ...]:
        """The same; scales [E, N, groups] are as wide as the kernel has them, and there are no zero points."""
        (n, k), (_, groups), count = sizes_of(self.codes[0]), sizes_of(self.scales[0]), len(self.codes)
        dtype = torch.float8_e4m3fn if self.wholes else torch.float8_e8m0fnu
        if self.as_integers:
            dtype = torch.uint8

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t if self.order is None else t[self.order]

        def pack(t: torch.Tensor) -> torch.Tensor:
            return pack_rows(rows(t).contiguous(), 4)

        codes = emit.stacked(f"{self.name}.codes", self.codes, (count, n, k // 2), torch.uint8, pack)
        scales = emit.stacked(
            f"{self.name}.scales", self.scales, (count, n, groups), dtype, lambda t: rows(t).contiguous().view(dtype)
        )
        biases = None
        if self.biases:
            biases = emit.stacked(f"{self.name}.bias", self.biases, (count, n), dtype_of(self.biases[0]), rows)
        if self.as_integers:
            codes = emit.op("Reshape", integers(emit, codes), emit.constant([count, n, k]))
            scales = halved_scales(emit, scales, exponents=not self.wholes)
            if self.wholes:
                wholes = emit.op("Unsqueeze", self.whole_scales(emit), emit.constant([1, 2]))
                scales = emit.op("Mul", scales, wholes)
        return codes, scales, biases, None

    def whole_scales(self, emit: Emitter) -> ir.Value | None:
        """float32 [E], one where the format has none; None for integers."""
        if self.wholes:
            shape = (len(self.wholes),)
            return emit.stacked(f"{self.name}.whole_scales", self.wholes, shape, torch.float32, lambda t: t)
        return emit.constant([1.0] * len(self.codes), torch.float32) if self.floats else None


@translates(ops.quantized_experts.default)
def _quantized_experts(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    name, order, bits, block = node.meta[Meta.EXPERTS].name, None, given.bits, given.block_size
    if given.activation == "swiglu" and not given.interleaved:  # the only order that the CPU provider takes
        rows = sizes_of(given.up_codes[0])[0 if given.floats else 1]
        order = torch.arange(rows).view(2, -1).t().reshape(-1)
    ups = _Side(
        f"{name}.up", given.up_codes, given.up_scales, given.up_zeros, given.up_biases, bits, given.up_group, block,
        order, given.up_wholes, given.floats, given.rounds,
    )  # fmt: skip
    downs = _Side(
        f"{name}.down", given.down_codes, given.down_scales, given.down_zeros, given.down_biases, bits,
        given.down_group, block, None, given.down_wholes, given.floats, given.rounds,
    )  # fmt: skip
    up, down = ups.inputs(emit), downs.inputs(emit)
    native = given.floats and not given.rounds  # the CPU, which alone rounds, has integers alone
    more: dict[str, Attribute] = {"quant_type": FLOATS[given.floats]} if native else {}
    wholes = (ups.whole_scales(emit), downs.whole_scales(emit)) if native else (None, None)
    bits = 8 if given.floats and not native else bits
    swiglu: dict[str, Attribute] = {}
    if given.activation == "swiglu":
        swiglu = {
            "swiglu_fusion": 1, "activation_alpha": float(given.alpha), "activation_beta": float(given.beta),
            "swiglu_limit": None if given.limit == float("inf") else float(given.limit),
        }  # fmt: skip
    return emit.op(
        QMOE, emit.get(given.x), emit.get(given.scores), *up[:3], *down[:3], None, None, None, up[3], down[3], None,
        emit.get(given.shares), *wholes, domain="com.microsoft", name=name, k=given.k,
        activation_type=given.activation, expert_weight_bits=bits, block_size=block,
        normalize_routing_weights=0, weights_prepacked=0, accuracy_level=4 if given.rounds else 1, more=swiglu | more,
    )  # fmt: skip
