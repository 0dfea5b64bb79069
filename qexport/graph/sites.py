"""Questions about a graph, answered from its dataflow: where are the linears, who feeds them, what can be folded where.

No architecture is named here. A norm followed by three projections is found because one value has three linears among
its users, whatever the modules are called.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .edit import is_call, owner_of, shape_of
from .meta import Meta
from .views import Add, AnyAttention, Item, LayerNorm, LinearCall, Mul, Norm, Reshape, operand, sizes_of, tensor_name

aten = torch.ops.aten
_POINTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.clamp.default,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
# Of scores, and of a part of them: others may stand beside those of what is chosen.
_SCORES = (aten.softmax.int, aten.sigmoid.default, aten.softplus.default, aten.sqrt.default, aten.slice.Tensor)
_LARGEST = (aten.topk.default, aten.sort.default, aten.max.dim)
_PLACES = (aten.argmax.default, aten.argsort.default)
_COMPARISONS = (
    aten.ge.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor, aten.eq.Tensor, aten.ge.Scalar, aten.gt.Scalar,
    aten.le.Scalar, aten.lt.Scalar,
)  # fmt: skip
# What takes some of the largest, or adds them up: to choose groups of experts, or as many as make up a share.
_PARTS = (
    aten.sum.dim_IntList, aten.cumsum.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default,
    aten.expand.default,
)  # fmt: skip
SHAPE_ONLY = Reshape.targets


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b with a constant weight.

    Attributes:
        name: the path of its module; with "@2" and so on behind it for further calls of the same module.
        node: the call; weight, bias: names of the tensors; shape: (out_features, in_features).
    """

    name: str
    node: Node
    weight: str
    bias: str | None
    shape: tuple[int, int]

    @property
    def input(self) -> Node:
        return operand(self.node)


@dataclass(frozen=True)
class FoldSite:
    """A value whose channels can be scaled without changing the function.

    Attributes:
        value: the node that the linears read, some of them with all rows in one dimension (see `rows_of`).
        consumers: the linears; their input columns are multiplied by the factor.
        kind: "norm" (gain and bias are divided), "rows" (output rows of the producing linear), "explicit" (a Mul).
        producer: the norm or linear that takes the division; None for "explicit".
        repeat: for rows behind grouped-query attention, (kv_heads, query heads per kv head, head_dim): one factor for a
            channel of a kv head, shared by its query heads; else None.
        why: for "explicit", what stands in the way of a fold.
        scalable: False where not even a Mul will do, because a weight of the consumers is used elsewhere too.
    """

    value: Node
    consumers: tuple[Linear, ...]
    kind: str
    producer: Node | None = None
    repeat: tuple[int, int, int] | None = None
    why: str = ""
    scalable: bool = True


def linears(graph: Graph) -> list[Linear]:
    """All linears with constant weights, in order."""
    return [found for node in graph.nodes if (found := linear_at(node))]


def linear_at(node: Node) -> Linear | None:
    """The linear that a node computes, if it is one with a constant weight."""
    found = LinearCall.match(node)
    if found is None or found.weight.op != "get_attr" or (found.bias is not None and found.bias.op != "get_attr"):
        return None
    weight, bias = tensor_name(found.weight), None if found.bias is None else tensor_name(found.bias)
    out_features, in_features = sizes_of(found.weight)
    name, use = _name(node, weight), node.meta.get(Meta.USE)
    return Linear(name if use is None else f"{name}@{use}", node, weight, bias, (out_features, in_features))


def module_of_call(name: str) -> str:
    """The path of the module that a linear of this name calls."""
    return re.sub(r"@\d+$", "", name)


def note_uses(graphs: Sequence[Graph]) -> None:
    """Tell calls of one module from one another, and note which weights linears of several graphs read.

    Args:
        graphs: of all blocks, in order.
    """
    for node in (node for graph in graphs for node in graph.nodes):
        for key in (Meta.USE, Meta.READ_ELSEWHERE):  # of a layer that this one was copied from
            node.meta.pop(key, None)
    calls: dict[str, int] = {}
    places: dict[str, set[int]] = {}
    found = [(place, linear) for place, graph in enumerate(graphs) for linear in linears(graph)]
    for place, linear in found:
        calls[linear.name] = calls.get(linear.name, 0) + 1
        places.setdefault(linear.weight, set()).add(place)
        if calls[linear.name] > 1:
            linear.node.meta[Meta.USE] = calls[linear.name]
    for _, linear in found:
        if len(places[linear.weight]) > 1:
            linear.node.meta[Meta.READ_ELSEWHERE] = True


def chooses(linear: Linear, last: bool = False) -> bool:
    """Whether the result decides which features are taken: a router's scores, of which the largest pick experts.

    It does where the places of the largest are read, or where scores are compared with the largest. The largest
    themselves are a value as any other.

    Args:
        last: what the block hands on is the model's result, and read by no later block.
    """
    waiting: list[tuple[Node, bool]] = [(linear.node, False)]
    seen: set[tuple[Node, bool]] = set()
    while waiting:
        node, largest = waiting.pop()
        for user in node.users:
            if is_call(user, *_PLACES) and _read(user, last):
                return True
            if largest and is_call(user, *_COMPARISONS):
                return True
            if is_call(user, *_LARGEST):
                parts = {item.index: part for part in user.users if (item := Item.match(part)) is not None}
                if 1 in parts and _read(parts[1], last):
                    return True
                reached = [(parts[0], True)] if 0 in parts else []
            elif is_call(user, *_POINTWISE, *_SCORES, *SHAPE_ONLY) or (largest and is_call(user, *_PARTS)):
                reached = [(user, largest)]
            else:
                continue
            waiting += [found for found in reached if found not in seen]
            seen.update(reached)
    return False


def _read(places: Node, last: bool) -> bool:
    """Whether anything but the model's caller reads places of elements."""
    return any(not last or user.op != "output" for user in places.users)


def projection_behind(value: Node) -> Linear | None:
    """The linear whose result, at most scaled, capped, shifted or cast, is `value`: what makes the logits."""
    node = value
    while (found := linear_at(node)) is None:
        inputs = [a for a in node.args if isinstance(a, Node) and a.op != "get_attr"]
        if not is_call(node, *_POINTWISE) or len(inputs) != 1:
            return None
        node = inputs[0]
    return found


def _name(node: Node, weight: str) -> str:
    """The path of the module that owns the weight; of the module that calls, where the weight is tied to another's."""
    if (given := node.meta.get(Meta.NAMED)) is not None:
        return str(given)
    owner, caller = owner_of(weight), node.meta.get(Meta.MODULE_PATH, "")
    related = not caller or f"{owner}.".startswith(f"{caller}.") or f"{caller}.".startswith(f"{owner}.")
    return owner if related else caller


def by_input(found: list[Linear]) -> dict[Node, list[Linear]]:
    """Linears grouped by the value they read: statistics belong to the value."""
    groups: dict[Node, list[Linear]] = {}
    for linear in found:
        groups.setdefault(linear.input, []).append(linear)
    return groups


def readers(node: Node) -> list[Node]:
    """Users of the value itself, not only of its size."""
    return [user for user in node.users if not is_call(user, aten.sym_size.int)]


def fold_sites(graph: Graph) -> list[FoldSite]:
    """For every value that linears read, where a per-channel factor can go (methods of SmoothQuant, AWQ, LAE)."""
    groups: dict[Node, list[Linear]] = {}
    for linear in linears(graph):
        groups.setdefault(rows_of(linear), []).append(linear)
    return [_fold_site(value, tuple(group)) for value, group in groups.items()]


def rows_of(linear: Linear) -> Node:
    """The value [batch, sequence, K] whose rows a linear reads, though it reads them as [rows, K], as routers do."""
    value = linear.input
    if is_call(value, *SHAPE_ONLY) and len(shape_of(value)) == 2:
        source = operand(value)
        if len(shape_of(source)) == 3 and shape_of(source)[-1] == shape_of(value)[-1]:
            return source
    return value


def _fold_site(value: Node, consumers: tuple[Linear, ...]) -> FoldSite:
    def explicit(why: str) -> FoldSite:
        return FoldSite(value, consumers, "explicit", why=why)

    if not _only_readers(value.graph, [c.weight for c in consumers], {c.node for c in consumers}):
        why = f"a weight of {consumers[0].name} is also used elsewhere"
        return FoldSite(value, consumers, "explicit", why=why, scalable=False)
    nodes = {c.node for c in consumers}
    views = {c.input for c in consumers if set(readers(c.input)) <= nodes}
    others = [u for u in readers(value) if u not in nodes | views]
    if others:
        return explicit(f"{value.name} is also read by {others[0].name}")
    if is_call(value, *Norm.targets):
        if _gain(value) is None:
            return explicit(f"the gain of {value.name} is not a constant of this block")
        if not _own_gain(value):
            return explicit(f"the gain of {value.name} is also used elsewhere")
        return FoldSite(value, consumers, "norm", value)
    if is_call(value, aten.relu.default):
        producer = operand(value)
        return _rows(value, consumers, producer) or explicit(f"the ReLU of {value.name} does not follow a linear")
    if (product := Mul.match(value)) is not None:
        for factor in product.operands:
            if isinstance(factor, Node) and (site := _rows(value, consumers, factor)):
                return site
        return explicit(f"neither factor of {value.name} comes straight from a linear")
    if attention := _attention_behind(value):
        return _through_attention(value, consumers, attention) or explicit(
            "the values of the attention do not come straight from a linear"
        )
    return explicit(
        f"{value.name} comes from {getattr(value.target, '__name__', value.target)}, which a factor cannot pass"
    )


def _rows(value: Node, consumers: tuple[Linear, ...], producer: Node) -> FoldSite | None:
    linear = linear_at(producer)
    if linear is None or len(readers(producer)) != 1 or not own_tensors(linear):
        return None
    # y * y scales with the square of a factor, and a single row is not a row for each channel.
    if sum(argument is producer for argument in value.args) > 1 or linear.shape[0] != consumers[0].shape[1]:
        return None
    return FoldSite(value, consumers, "rows", producer)


def _only_readers(graph: Graph, tensors: list[str | None], nodes: set[Node]) -> bool:
    """Whether nothing but `nodes`, linears and norms of this block, reads these tensors."""
    if any(node.meta.get(Meta.READ_ELSEWHERE) for node in nodes):
        return False
    return all(set(n.users) <= nodes for n in graph.nodes if n.op == "get_attr" and n.target in tensors)


def own_tensors(linear: Linear) -> bool:
    """Whether nothing else reads the weight and the bias of a linear."""
    return _only_readers(linear.node.graph, [linear.weight, linear.bias], {linear.node})


def _own_gain(norm: Node) -> bool:
    """Whether a norm shares neither its gain nor its bias."""
    gain = Norm.of(norm).weight
    if gain is None or (gain.op != "get_attr" and set(gain.users) != {norm}):
        return False
    return _only_readers(norm.graph, [norm_gain(norm)[0], norm_bias(norm)], {norm, gain})


def _attention_behind(value: Node) -> Node | None:
    """The attention node whose output, only reshaped, is `value`."""
    node = value
    while is_call(node, *SHAPE_ONLY, aten.transpose.int) and (node is value or len(readers(node)) == 1):
        node = operand(node)
    if is_call(node, aten.scaled_dot_product_attention.default):
        return node
    item = Item.match(node)
    if item is not None and item.index == 0 and is_call(item.source, torch.ops.qexport.cached_attention.default):
        return item.source
    return None


def _through_attention(value: Node, consumers: tuple[Linear, ...], attention: Node) -> FoldSite | None:
    """v to o: a factor on v's output channels passes through the weighted sum over positions."""
    plain = is_call(attention, aten.scaled_dot_product_attention.default)
    result = attention if plain else next(u for u in attention.users if Item.of(u).index == 0)
    if len(readers(result)) != 1:
        return None
    found = AnyAttention.of(attention)
    node, shape, heads = found.value, shape_of(found.value), shape_of(found.query)[1]
    if len(shape) != 4 or not isinstance(heads, int):
        return None
    kv_heads, head_dim = shape[1], shape[3]
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None
    while is_call(node, *SHAPE_ONLY, aten.transpose.int):
        if len(readers(node)) != 1:
            return None
        node = operand(node)
    linear = linear_at(node)
    if linear is None or linear.shape[0] != kv_heads * head_dim or len(readers(node)) != 1 or not own_tensors(linear):
        return None
    return FoldSite(value, consumers, "rows", node, repeat=(kv_heads, heads // kv_heads, head_dim))


def _gain(norm: Node) -> tuple[Node, float] | None:
    """(gain tensor, offset): the norm multiplies by offset + gain."""
    weight = Norm.of(norm).weight
    if weight is None:
        return None
    if weight.op == "get_attr":
        return weight, 0.0
    shifted = Add.match(weight)
    if shifted is None or shifted.x.op != "get_attr" or not isinstance(shifted.other, (int, float)):
        return None
    return shifted.x, float(shifted.other)


def norm_gain(norm: Node) -> tuple[str, float]:
    """Name of a norm's gain tensor and the constant added to it (1.0 in Gemma's norms).

    Raises:
        TypeError: its gain is no tensor of the module.
    """
    if (found := _gain(norm)) is None:
        raise TypeError(f"the gain of {norm} is no tensor of its module")
    return tensor_name(found[0]), found[1]


def norm_bias(norm: Node) -> str | None:
    """Name of a LayerNorm's bias tensor."""
    found = LayerNorm.match(norm)
    return None if found is None or found.bias is None else tensor_name(found.bias)
