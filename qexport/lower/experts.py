"""A mixture of quantized experts as one kernel, which computes the experts that a token chose and no others.

The graph that passes see has every expert on every token (see capture/experts.py). Here the whole of it is found again
by dataflow: what every token gives each expert, the two linears of each and what stands between them, and the sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..passes.edit import call, finish, is_call, shape_of
from ..passes.sites import readers
from .gates import gate_of
from .merge import Linear, linear_of
from .shares import columns, never_negative
from .targets.forms import input_of, linear_products
from .targets.qmoe import Form, Gate, Weights

aten = torch.ops.aten
ops = torch.ops.qexport
_GATE_NODES = 16  # between the two linears of an expert, at most


class Dense(Exception):
    """Why a mixture stays as it is."""


@dataclass(frozen=True)
class Experts:
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

    up: Linear
    gate: Gate
    down: Linear
    part: Node


def gather_experts(module: GraphModule, why_dense: Callable[[Form], str]) -> dict[str, str]:
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
        except Dense as why:
            dense[shares.meta["module_path"]] = str(why)
    finish(module)
    return dense


class _Gathering:
    """One mixture.

    Args:
        shares: what every token gives each expert, [tokens, experts].
    """

    def __init__(self, module: GraphModule, shares: Node):
        self._graph, self._shares = module.graph, shares
        found = (linear_of(p) for p in linear_products(module.graph) if not {"plane_of", "branch_of"} & set(p.meta))
        self._linears = {linear.result: linear for linear in found if linear is not None}

    def run(self, why_dense: Callable[[Form], str]) -> None:
        """Raises Dense."""
        found = columns(self._shares)
        if found is None:
            raise Dense("its shares are read in another way than one for each expert")
        if not never_negative(self._shares.args[1]):
            raise Dense("a share may be below zero, and QMoE leaves such experts out")
        experts = [self._expert(column) for column in found]
        total = _sum_of([expert.part for expert in experts])
        form = _form_of(experts)
        if why := form.why_dense() or why_dense(form):
            raise Dense(why)
        self._replace(experts, total, form)

    def _expert(self, share: Node) -> _Expert:
        """The share stands in front of the second linear, or behind it."""
        scaled = _only(share, aten.mul.Tensor)
        value = next(a for a in scaled.args if a is not share)
        if value in self._linears:
            down, inner, part = self._linears[value], self._linears[value].product.args[0], scaled
        else:
            down, inner = self._reader(scaled), value
            part = down.result
        up = self._maker(inner)
        gate = gate_of(inner, up.result)
        if gate is None:
            raise Dense("what stands between its linears is no gate that QMoE has")
        if any(input_of(product) is not product.args[0] for product in (up.product, down.product)):
            raise Dense("what its linears read is rounded or split on the way")
        return _Expert(up, gate, down, part)

    def _reader(self, value: Node) -> Linear:
        """The linear that reads a value and alone does."""
        users = readers(value)
        for linear in self._linears.values():
            if users == [linear.product]:
                return linear
        raise Dense(_why_no_linear(users))

    def _maker(self, value: Node) -> Linear:
        """The linear whose result a value is made of, a few steps on."""
        seen = [value]
        for node in seen:  # grows while it is walked
            if node in self._linears:
                return self._linears[node]
            seen += [n for n in node.all_input_nodes if n not in seen][: _GATE_NODES - len(seen)]
        raise Dense(_why_no_linear(seen))

    def _replace(self, experts: Sequence[_Expert], total: Node, form: Form) -> None:
        ups, downs = [e.up for e in experts], [e.down for e in experts]
        gate, k = form.gate, shape_of(self._shares.args[0])[-1]
        arguments = (
            ups[0].product.args[0], self._shares, self._shares, k, *_tensors(ups), *_tensors(downs), form.up.bits,
            form.up.group, form.down.group, form.block_size, gate.activation, gate.interleaved, gate.alpha, gate.beta,
            gate.limit, False,
        )  # fmt: skip
        with self._graph.inserting_after(total):
            node = call(self._graph, ops.quantized_experts.default, arguments, like=total)
        names = (tuple(linear.name for linear in side) for side in (ups, downs))
        node.meta["experts"] = Experts(self._shares.meta["module_path"], *names)
        total.replace_all_uses_with(node)


def _only(value: Node, target) -> Node:
    users = readers(value)
    if len(users) != 1 or not is_call(users[0], target):
        raise Dense("a share is read in another way than as a factor")
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
        if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or set(users[0].args) != {total, part}:
            raise Dense("what its experts make is not just summed")
        total = users[0]
    return total


def _form_of(experts: Sequence[_Expert]) -> Form:
    x = experts[0].up.product.args[0]
    if any(expert.up.product.args[0] is not x for expert in experts):
        raise Dense("its experts do not all read one value")
    up, down = (_one([_weights(getattr(e, side)) for e in experts]) for side in ("up", "down"))
    hidden, inner = (shape_of(linear.product.args[1])[0] for linear in (experts[0].up, experts[0].down))
    return Form(hidden, inner, up, down, _one([expert.gate for expert in experts]))


def _one(found: Sequence):
    """What all of these are."""
    if len(kinds := list(dict.fromkeys(found))) > 1:
        raise Dense(f"its experts are of several kinds: {' and '.join(map(str, kinds))}")
    return kinds[0]


def _weights(linear: Linear) -> Weights:
    if linear.addends:
        raise Dense("more than a bias is added to what its linears make")
    weight = linear.product.args[1]
    if not is_call(weight, ops.dequantize_linear.default) or weight.args[0].op != "get_attr" or weight.args[4] == 0:
        raise Dense("its weights are no codes in groups")
    codes, _scale, zero_point, _axis, group, bits = weight.args
    return Weights(bits, group, zero_point is not None)


def _tensors(linears: Sequence[Linear]) -> tuple[list[Node], ...]:
    """(codes, scales, zero points, biases) of all experts, an empty list where they have none."""
    weights = [linear.product.args[1].args for linear in linears]
    codes, scales, zeros = (list(parts) for parts in zip(*(w[:3] for w in weights), strict=True))
    biases = [linear.bias for linear in linears]
    if len({bias is None for bias in biases}) > 1:
        raise Dense("some of its linears have biases and others have none")
    return codes, scales, *([] if None in parts else parts for parts in (zeros, biases))
