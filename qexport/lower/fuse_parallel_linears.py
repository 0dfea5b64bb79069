"""One product for quantized linears that read one value, such as q, k and v, or gate and up.

Their codes and scales stand side by side along the output features, so that each result is what it was. What is added
to the products (biases, a second plane, low-rank branches, float paths of outliers) is added once, and a split behind
the sum hands every reader its columns. A long product costs less than several short ones: its input is read, rounded
and handed to threads once.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import add_tensor, call, finish, get_tensor, is_call, shape_of
from ..graph.meta import BESIDE, Meta
from ..graph.schema import bind
from ..graph.sites import module_of_call
from ..graph.views import Add, Matmul, size_at, tensor_name
from ..passes.formats import match_form
from ..quant.concat_tensor import ConcatTensor
from .qdq_patterns import linear_products

aten = torch.ops.aten
_AS_KEPT = (Meta.COARSE, Meta.PLANES, Meta.ODD)  # how the file keeps a tensor


@dataclass
class Merged:
    """What became of the linears of a block.

    Attributes:
        joined: the new tensors, by name.
        apart: why a linear that shares its input with others kept a product of its own, by name.
        together: the names of linears that share one.
    """

    joined: dict[str, ConcatTensor] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    together: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear: its product, what is added to it in order, and the sum.

    Attributes:
        bias_at: how many addends come before the bias.
    """

    name: str
    product: Node
    addends: tuple[Node, ...]
    bias: Node | None
    bias_at: int
    result: Node

    @property
    def size(self) -> int:
        return size_at(self.product, -1)

    @property
    def input(self) -> Node:
        return Matmul.of(self.product).x

    @property
    def weight(self) -> Node:
        return Matmul.of(self.product).weight


def merge(module: GraphModule) -> Merged:
    """Merge the products of a canonical block, in place; its tensors may be on the meta device.

    The product of merged linears has all their names in one (`Meta.LINEAR`), and `Meta.COLUMNS`: the columns
    (start, stop) of each linear in the value that has the same name as its result.
    """
    by_value: dict[Node, list[Node]] = {}
    for product in linear_products(module.graph):
        if not BESIDE & set(product.meta):
            by_value.setdefault(Matmul.of(product).x, []).append(product)
    merged = Merged()
    for products in by_value.values():
        if len(products) < 2:
            continue
        groups: dict[tuple[Any, ...], list[QuantizedLinear]] = {}
        for product in products:
            if (linear := linear_of(product)) is None:
                merged.apart[product.meta[Meta.LINEAR]] = "its result is not a plain sum"
            elif why := _why_apart(linear):
                merged.apart[linear.name] = why
            else:
                groups.setdefault((_form(linear.weight), len(linear.addends)), []).append(linear)
        for group in groups.values():
            why = _move_up(group) if len(group) > 1 else "no other linear that reads the same value has its form"
            if why:
                merged.apart.update(dict.fromkeys((linear.name for linear in group), why))
            else:
                _Merge(module, group, merged.joined).run()
                merged.together.append(tuple(linear.name for linear in group))
    finish(module)
    return merged


def linear_of(product: Node) -> QuantizedLinear | None:
    """What is added to a product, up to the result of its linear."""
    name, node, bias_at = product.meta[Meta.LINEAR], product, 0
    bias: Node | None = None
    addends: list[Node] = []
    while node.meta.get(Meta.RESULT_OF) != name:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        total = Add.match(user)
        if total is None or total.x is not node or not isinstance(total.other, Node):
            return None
        addend, node = total.other, user
        if bias is None and addend.op == "get_attr" and len(shape_of(addend)) == 1:
            bias, bias_at = addend, len(addends)
        else:
            addends.append(addend)
    return QuantizedLinear(name, product, tuple(addends), bias, bias_at, node)


def _why_apart(linear: QuantizedLinear) -> str:
    """Why a linear can be merged with no other; empty where it can."""
    if any(is_call(user, torch.ops.qexport.lstm_steps_int8.default) for user in linear.result.users):
        return "it is one operator with its recurrent layer"
    if any(shape_of(addend) != shape_of(linear.result) for addend in linear.addends):
        return "what is added to it is not of its shape"
    return _why_not_beside(linear.weight)


def _why_not_beside(weight: Node) -> str:
    """Why a weight [K, N] cannot stand beside others; empty where it can."""
    if weight.op == "get_attr":
        return ""
    form = match_form(weight)
    return "its weight has a form of its own" if form is None else form.why_not_beside(weight)


def _form(node: Node) -> tuple[Any, ...]:
    """What must be equal for weights to stand side by side: everything but values and the number of columns."""
    if node.op == "get_attr":
        spec = node.meta[Meta.SPEC]
        return spec.dtype, spec.shape[:-1], *(node.meta.get(key) for key in _AS_KEPT)
    return node.target, *(_form(a) if isinstance(a, Node) else a for a in vars(bind(node)).values())


def _same_but_columns(nodes: Sequence[Node]) -> bool:
    """Whether these are products of one value with weights that can stand side by side."""
    products = [product for node in nodes if (product := Matmul.match(node)) is not None]
    if len(products) < len(nodes) or any(product.x is not products[0].x for product in products):
        return False
    weights = [product.weight for product in products]
    return not any(map(_why_not_beside, weights)) and len(set(map(_form, weights))) == 1


def _move_up(group: Sequence[QuantizedLinear]) -> str:
    """Move what is added to the products in front of the first of them; says why not where that cannot be."""
    first = group[0].product
    own = {node for linear in group for node in (linear.product, linear.result)}
    late: set[Node] = set()
    waiting = [addend for linear in group for addend in linear.addends]
    while waiting:
        node = waiting.pop()
        if node in own:
            return "what is added to one of these linears reads the result of another"
        if node not in late and first < node:
            late.add(node)
            waiting += node.all_input_nodes
    for node in sorted(late):
        first.prepend(node)
    return ""


class _Merge:
    """Merges linears of one form.

    Args:
        joined: gets the new tensors.
    """

    def __init__(self, module: GraphModule, group: Sequence[QuantizedLinear], joined: dict[str, ConcatTensor]):
        self._module, self._group, self._joined = module, group, joined
        self._name = joint_name([linear.name for linear in group])

    def run(self) -> None:
        graph, group = self._module.graph, self._group
        sizes = [linear.size for linear in group]
        with graph.inserting_before(group[0].product):
            product = self._product([linear.product for linear in group])
            result = product
            addends = [self._sum(nodes) for nodes in zip(*(linear.addends for linear in group), strict=True)]
            if biased := [linear for linear in group if linear.bias is not None]:
                addends.insert(biased[0].bias_at, self._bias())
            for addend in addends:
                result = call(graph, aten.add.Tensor, (result, addend), like=product)
            pieces = graph.call_function(aten.split_with_sizes.default, (result, sizes, -1))
            spec = result.meta[Meta.SPEC]
            specs = tuple(replace(spec, shape=(*spec.shape[:-1], size)) for size in sizes)
            pieces.meta = {Meta.SPEC: specs, Meta.MODULE_PATH: result.meta[Meta.MODULE_PATH]}
            for place, (linear, spec) in enumerate(zip(group, specs, strict=True)):
                piece = call(graph, operator.getitem, (pieces, place), like=result, shape=spec.shape)
                linear.result.replace_all_uses_with(piece)
        columns = pairwise(accumulate(sizes, initial=0))
        product.meta[Meta.COLUMNS] = {linear.name: span for linear, span in zip(group, columns, strict=True)}
        result.meta[Meta.RESULT_OF] = self._name
        if orders := {k: v for linear in group for k, v in linear.result.meta.get(Meta.ORDERS, {}).items()}:
            result.meta[Meta.ORDERS] = orders

    def _sum(self, nodes: Sequence[Node]) -> Node:
        """What is added to the products, side by side: one product too, where the first factor is the same.

        Low-rank branches of their own stay apart: one with its second factors along a diagonal is no faster than
        several, and in a small model's file the zeros are a fourteenth of the linears.
        """
        if _same_but_columns(nodes):
            return self._product(nodes)
        shape = (*shape_of(nodes[0])[:-1], sum(size_at(node, -1) for node in nodes))
        return call(self._module.graph, aten.cat.default, (list(nodes), -1), like=nodes[0], shape=shape)

    def _product(self, nodes: Sequence[Node]) -> Node:
        """One product for several with the same first factor."""
        products = [Matmul.of(node) for node in nodes]
        first, weight = nodes[0], self._weight([product.weight for product in products])
        shape = (*shape_of(first)[:-1], shape_of(weight)[-1])
        product = call(self._module.graph, aten.matmul.default, (products[0].x, weight), like=first, shape=shape)
        if Meta.LINEAR in first.meta:
            product.meta[Meta.LINEAR] = self._name_like(first.meta[Meta.LINEAR])
            product.meta |= {key: self._name for key in BESIDE if key in first.meta}
        return product

    def _weight(self, nodes: Sequence[Node]) -> Node:
        """Weights of one form, side by side."""
        first = nodes[0]
        if first.op == "get_attr":
            joined = self._add(tensor_name(first), ConcatTensor(tuple(map(tensor_name, nodes))))
            joined.meta |= {key: first.meta[key] for key in _AS_KEPT if key in first.meta}
            return joined
        given = [vars(bind(node)) for node in nodes]
        arguments = tuple(
            self._weight([other[name] for other in given]) if isinstance(argument, Node) else argument
            for name, argument in given[0].items()
        )
        columns = sum(size_at(node, -1) for node in nodes)
        return call(self._module.graph, first.target, arguments, like=first, shape=(shape_of(first)[0], columns))

    def _bias(self) -> Node:
        """The biases side by side, as many zeros where a linear has none."""
        parts = [linear.size if linear.bias is None else tensor_name(linear.bias) for linear in self._group]
        return self._add(next(part for part in parts if isinstance(part, str)), ConcatTensor(tuple(parts)))

    def _add(self, like: str, joined: ConcatTensor) -> Node:
        name = self._name_like(like)
        self._joined[name] = joined
        tensor = joined.make(lambda part: get_tensor(self._module, part))
        return add_tensor(self._module.graph, name, tensor)

    def _name_like(self, name: str) -> str:
        """The name of what belongs to one linear, or to all calls of its module, for all of them."""
        names = [linear.name for linear in self._group]
        for known in (names, [module_of_call(name) for name in names]):
            owner = next((one for one in known if f"{name}.".startswith(f"{one}.")), None)
            if owner is not None:
                return joint_name(known) + name.removeprefix(owner)
        return f"{self._name}.{name}"


def joint_name(names: Sequence[str]) -> str:
    """One name for several linears: "a.q", "a.k", "a.v" is "a.q+k+v"."""
    parents = [name.split(".")[:-1] for name in names]
    shared = "".join(f"{step}." for step in commonprefix(parents))
    return shared + "+".join(name.removeprefix(shared) for name in names)
