"""Questions about a graph, answered from its dataflow: where are the linears, who feeds them, what can be folded where.

No architecture is named here. A norm followed by three projections is found because one value has three linears among
its users, whatever the modules are called.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .edit import is_call, owner_of, shape_of

aten = torch.ops.aten
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_POINTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.clamp.default,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
_SCORES = (aten.softmax.int, aten.sigmoid.default, aten.softplus.default, aten.sqrt.default)
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
SHAPE_ONLY = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b with a constant weight.

    Attributes:
        name: the path of its module.
        node: the call; weight, bias: names of the tensors; shape: (out_features, in_features).
    """

    name: str
    node: Node
    weight: str
    bias: str | None
    shape: tuple[int, int]

    @property
    def input(self) -> Node:
        return self.node.args[0]


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
    if not is_call(node, aten.linear.default) or node.args[1].op != "get_attr":
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is not None and bias.op != "get_attr":
        return None
    weight = node.args[1].target
    return Linear(_name(node, weight), node, weight, bias.target if bias else None, shape_of(node.args[1]))


def chooses(linear: Linear, last: bool = False) -> bool:
    """Whether the result decides which features are taken: a router's scores, of which the largest pick experts.

    It does where the places of the largest are read, or where scores are compared with the largest. The largest
    themselves are a value as any other.

    Args:
        last: what the block hands on is the model's result, and read by no later block.
    """
    waiting, seen = [(linear.node, False)], set()
    while waiting:
        node, largest = waiting.pop()
        for user in node.users:
            if is_call(user, *_PLACES) and _read(user, last):
                return True
            if largest and is_call(user, *_COMPARISONS):
                return True
            if is_call(user, *_LARGEST):
                parts = {part.args[1]: part for part in user.users if is_call(part, operator.getitem)}
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
    owner, caller = owner_of(weight), node.meta.get("module_path", "")
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
        source = value.args[0]
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
    if is_call(value, *_NORMS):
        if _gain(value) is None:
            return explicit(f"the gain of {value.name} is not a constant of this block")
        if not _own_gain(value):
            return explicit(f"the gain of {value.name} is also used elsewhere")
        return FoldSite(value, consumers, "norm", value)
    if is_call(value, aten.relu.default):
        return _rows(value, consumers, value.args[0]) or explicit(f"the ReLU of {value.name} does not follow a linear")
    if is_call(value, aten.mul.Tensor):
        for operand in value.args:
            if isinstance(operand, Node) and (site := _rows(value, consumers, operand)):
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
    if linear is None or len(readers(producer)) != 1 or not _own_tensors(linear):
        return None
    # y * y scales with the square of a factor, and a single row is not a row for each channel.
    if value.args.count(producer) > 1 or linear.shape[0] != consumers[0].shape[1]:
        return None
    return FoldSite(value, consumers, "rows", producer)


def _only_readers(graph: Graph, tensors: list[str | None], nodes: set[Node]) -> bool:
    """Whether nothing but `nodes` reads these tensors."""
    return all(set(n.users) <= nodes for n in graph.nodes if n.op == "get_attr" and n.target in tensors)


def _own_tensors(linear: Linear) -> bool:
    return _only_readers(linear.node.graph, [linear.weight, linear.bias], {linear.node})


def _own_gain(norm: Node) -> bool:
    """Whether a norm shares neither its gain nor its bias."""
    gain = norm.args[2]
    if gain.op != "get_attr" and set(gain.users) != {norm}:
        return False
    return _only_readers(norm.graph, [_gain(norm)[0].target, norm_bias(norm)], {norm, gain})


def _attention_behind(value: Node) -> Node | None:
    """The attention node whose output, only reshaped, is `value`."""
    node = value
    while is_call(node, *SHAPE_ONLY, aten.transpose.int) and (node is value or len(readers(node)) == 1):
        node = node.args[0]
    if is_call(node, aten.scaled_dot_product_attention.default):
        return node
    if (
        is_call(node, operator.getitem)
        and node.args[1] == 0
        and is_call(node.args[0], torch.ops.qexport.cached_attention.default)
    ):
        return node.args[0]
    return None


def _through_attention(value: Node, consumers: tuple[Linear, ...], attention: Node) -> FoldSite | None:
    """v to o: a factor on v's output channels passes through the weighted sum over positions."""
    plain = is_call(attention, aten.scaled_dot_product_attention.default)
    result = attention if plain else next(u for u in attention.users if u.args[1] == 0)
    if len(readers(result)) != 1:
        return None
    node = attention.args[2]
    _, kv_heads, _, head_dim = shape_of(node)
    heads = shape_of(attention.args[0])[1]
    while is_call(node, *SHAPE_ONLY, aten.transpose.int):
        if len(readers(node)) != 1:
            return None
        node = node.args[0]
    linear = linear_at(node)
    if linear is None or linear.shape[0] != kv_heads * head_dim or len(readers(node)) != 1 or not _own_tensors(linear):
        return None
    return FoldSite(value, consumers, "rows", node, repeat=(kv_heads, heads // kv_heads, head_dim))


def _gain(norm: Node) -> tuple[Node, float] | None:
    """(gain tensor, offset): the norm multiplies by offset + gain."""
    weight = norm.args[2] if len(norm.args) > 2 else None
    if weight is None:
        return None
    if weight.op == "get_attr":
        return weight, 0.0
    if is_call(weight, aten.add.Tensor):
        tensor, offset = weight.args if isinstance(weight.args[0], Node) else weight.args[::-1]
        if tensor.op == "get_attr" and isinstance(offset, (int, float)):
            return tensor, float(offset)
    return None


def norm_gain(norm: Node) -> tuple[str, float]:
    """Name of a norm's gain tensor and the constant added to it (1.0 in Gemma's norms)."""
    node, offset = _gain(norm)
    return node.target, offset


def norm_bias(norm: Node) -> str | None:
    """Name of a LayerNorm's bias tensor."""
    if is_call(norm, aten.layer_norm.default) and len(norm.args) > 3 and norm.args[3] is not None:
        return norm.args[3].target
    return None
