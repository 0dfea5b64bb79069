"""A mixture of quantized experts as one kernel, which computes the experts that a token chose and no others.

The graph that passes see has every expert on every token (see capture/experts.py). Here the whole of it is found again
by dataflow: what every token gives each expert, the two linears of each and what stands between them, and the sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import call, finish, is_call
from ..graph.meta import BESIDE, Meta
from ..graph.schema import bind
from ..graph.sites import readers
from ..graph.views import Add, DequantizeLinear, ExpertShares, Mul, size_at
from ..quant.formats.small_floats import format_named
from .fuse_parallel_linears import QuantizedLinear, linear_of
from .match_gated_activation import gate_of
from .moe_form import ExpertWeights, Gate, MoeForm
from .qdq_patterns import input_of, linear_products
from .routing_weights import columns, never_negative

aten = torch.ops.aten
ops = torch.ops.qexport
_FACTOR = "a share is read in another way than as a factor"
_T = TypeVar("_T")
_GATE_NODES = 16  # between the two linears of an expert, at most


class StaysDense(Exception):
    """Why a mixture stays as it is."""


@dataclass(frozen=True)
class FusedExperts:
    """A mixture in one node, in its meta "experts".

    Attributes:
        up, down: names of the linears, by expert.
    """

    name: str
    up: tuple[str, ...]
    down: tuple[str, ...]


@dataclass(frozen=True)
class _Expert:
    """The two linears of an expert, what stands between them, and what it adds to the sum."""

    up: QuantizedLinear
    gate: Gate
    down: QuantizedLinear
    part: Node


def gather_experts(module: GraphModule, why_dense: Callable[[MoeForm], str]) -> dict[str, str]:
    """Put the mixtures of a canonical block into one node each, in place; its tensors may be on the meta device.

    Args:
        why_dense: why a provider cannot run a mixture; empty where it can.

    Returns:
        For every mixture that stays as it is, by the path of its module, why.
    """
    dense: dict[str, str] = {}
    for shares in [node for node in module.graph.nodes if is_call(node, ops.expert_shares.default)]:
        try:
            _Gathering(module, shares).run(why_dense)
        except StaysDense as why:
            dense[shares.meta[Meta.MODULE_PATH]] = str(why)
    finish(module)
    return dense


class _Gathering:
    """One mixture.

    Args:
        shares: what every token gives each expert, [tokens, experts].
    """

    def __init__(self, module: GraphModule, shares: Node):
        self._graph, self._shares = module.graph, shares
        found = (linear_of(p) for p in linear_products(module.graph) if not BESIDE & set(p.meta))
        self._linears = {linear.result: linear for linear in found if linear is not None}

    def run(self, why_dense: Callable[[MoeForm], str]) -> None:
        """Raises Dense."""
        found = columns(self._shares)
        if found is None:
            raise StaysDense("its shares are read in another way than one for each expert")
        if not never_negative(ExpertShares.of(self._shares).weights):
            raise StaysDense("a share may be below zero, and QMoE leaves such experts out")
        experts = [self._expert(column) for column in found]
        total = _sum_of([expert.part for expert in experts])
        form = _form_of(experts)
        if why := form.why_dense() or why_dense(form):
            raise StaysDense(why)
        self._replace(experts, total, form)

    def _expert(self, share: Node) -> _Expert:
        """The share stands in front of the second linear, or behind it."""
        scaled = _only(share, aten.mul.Tensor)
        value = next(a for a in Mul.of(scaled).operands if a is not share)
        if not isinstance(value, Node):
            raise StaysDense(_FACTOR)
        if value in self._linears:
            down = self._linears[value]
            inner, part = down.input, scaled
        else:
            down, inner = self._reader(scaled), value
            part = down.result
        up = self._maker(inner)
        gate = gate_of(inner, up.result)
        if gate is None:
            raise StaysDense("QMoE has no gate like the one between its linears")
        if any(input_of(linear.product) is not linear.input for linear in (up, down)):
            raise StaysDense("what its linears read is rounded or split on the way")
        return _Expert(up, gate, down, part)

    def _reader(self, value: Node) -> QuantizedLinear:
        """The linear that reads a value and alone does."""
        users = readers(value)
        for linear in self._linears.values():
            if users == [linear.product]:
                return linear
        raise StaysDense(_why_no_linear(users))

    def _maker(self, value: Node) -> QuantizedLinear:
        """The linear whose result a value is made of, a few steps on."""
        seen = [value]
        for node in seen:  # grows while it is walked
            if node in self._linears:
                return self._linears[node]
            seen += [n for n in node.all_input_nodes if n not in seen][: _GATE_NODES - len(seen)]
        raise StaysDense(_why_no_linear(seen))

    def _replace(self, experts: Sequence[_Expert], total: Node, form: MoeForm) -> None:
        ups, downs = [e.up for e in experts], [e.down for e in experts]
        gate, k = form.gate, size_at(ExpertShares.of(self._shares).index, -1)
        arguments = (
            ups[0].input, self._shares, self._shares, k, *_tensors(ups), *_tensors(downs), form.up.bits,
            form.up.group, form.down.group, form.block_size, gate.activation, gate.interleaved, gate.alpha, gate.beta,
            gate.limit, False, form.up.floats, _whole_scales(ups), _whole_scales(downs),
        )  # fmt: skip
        with self._graph.inserting_after(total):
            node = call(self._graph, ops.quantized_experts.default, arguments, like=total)
        names = (tuple(linear.name for linear in side) for side in (ups, downs))
        node.meta[Meta.EXPERTS] = FusedExperts(self._shares.meta[Meta.MODULE_PATH], *names)
        total.replace_all_uses_with(node)


def _only(value: Node, target: Any) -> Node:
    users = readers(value)
    if len(users) != 1 or not is_call(users[0], target):
        raise StaysDense(_FACTOR)
    return users[0]


def _why_no_linear(nodes: Sequence[Node]) -> str:
    if any(is_call(node, aten.linear.default) for node in nodes):
        return "linears of it are float"
    return "what its linears read is rounded or scaled on the way, or more than a bias is added to what they make"


def _sum_of(parts: Sequence[Node]) -> Node:
    """The sum that reads nothing else, one part after the other."""
    total = parts[0]
    for part in parts[1:]:
        users = readers(total)
        added = Add.match(users[0]) if len(users) == 1 else None
        if added is None or set(added.operands) != {total, part}:
            raise StaysDense("what its experts make is not just summed")
        total = users[0]
    return total


def _form_of(experts: Sequence[_Expert]) -> MoeForm:
    if any(expert.up.input is not experts[0].up.input for expert in experts):
        raise StaysDense("its experts do not all read one value")
    up, down = (_one([_weights(getattr(e, side)) for e in experts]) for side in ("up", "down"))
    hidden, inner = (size_at(linear.weight, 0) for linear in (experts[0].up, experts[0].down))
    return MoeForm(hidden, inner, up, down, _one([expert.gate for expert in experts]))


def _one(found: Sequence[_T]) -> _T:
    """What all of these are."""
    if len(kinds := list(dict.fromkeys(found))) > 1:
        raise StaysDense(f"its experts are of several kinds: {' and '.join(map(str, kinds))}")
    return kinds[0]


def _weights(linear: QuantizedLinear) -> ExpertWeights:
    if linear.addends:
        raise StaysDense("more than a bias is added to what its linears make")
    if is_call(linear.weight, ops.dequantize_floats.default):
        fmt = format_named(bind(linear.weight).name)
        return ExpertWeights(fmt.bits, fmt.group_size, False, fmt.name)
    weight = DequantizeLinear.match(linear.weight)
    if weight is None or weight.codes.op != "get_attr" or weight.block_size == 0:
        raise StaysDense("its weights are not codes in groups")
    return ExpertWeights(weight.bits, weight.block_size, weight.zero_point is not None)


def _whole_scales(linears: Sequence[QuantizedLinear]) -> list[Node]:
    """The scale of each whole weight, of formats that have one."""
    floats = [bind(n.weight) for n in linears if is_call(n.weight, ops.dequantize_floats.default)]
    return [weight.tensor_scale for weight in floats if weight.tensor_scale is not None]


def _tensors(linears: Sequence[QuantizedLinear]) -> tuple[list[Node], ...]:
    """(codes, scales, zero points, biases) of all experts, an empty list where they have none."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise StaysDense("some of its linears have biases and others have none")
    if is_call(linears[0].weight, ops.dequantize_floats.default):
        floats = [bind(linear.weight) for linear in linears]
        return [weight.codes for weight in floats], [weight.scale for weight in floats], [], biases
    weights = [DequantizeLinear.of(linear.weight) for linear in linears]
    zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return [weight.codes for weight in weights], [weight.scale for weight in weights], zeros, biases
