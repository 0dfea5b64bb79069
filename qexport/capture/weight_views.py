"""Weights that a graph reads in parts or transposed, as weights of their own, and products with weights as linears.

An expert's matrix is a slice of one tensor of all experts; GPT-2 keeps its matrices transposed. Passes know linears
with a weight [out, in] of their own, so the graph reads such weights under names of their own, and `WeightViews` cuts
them from the checkpoint's tensors when they are loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import get_tensor, is_call, set_tensor
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.views import Matmul, Permute, Reshape, Select, Transpose, tensor_name
from ..models.checkpoint import Checkpoint

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightView:
    """Part of a weight.

    Attributes:
        source: name of the weight.
        index: along its first axis; None for all of it.
        transposed: the last two axes exchanged.
        stacked: how many matrices lie one below another in it, of which `index` is one; 0: it has an axis of them.
    """

    source: str
    index: int | None = None
    transposed: bool = False
    stacked: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        at = self.at(tensor.shape)
        part = tensor if at is None else tensor[at]
        return part.t() if self.transposed else part

    def at(self, shape: Sequence[int]) -> int | slice | None:
        """Where it is along the first axis of its weight of this shape; None for all of it."""
        if not self.stacked or self.index is None:
            return self.index
        height = shape[0] // self.stacked
        return slice(self.index * height, (self.index + 1) * height)

    def name(self, dim: int) -> str:
        """What it is called; dim: axes that it has."""
        if self.index is None:
            return self.source
        owner, _, leaf = self.source.rpartition(".")
        whole = f"{owner}.{self.index}.{leaf}"
        return whole if dim < 2 or leaf == "weight" else f"{whole}.weight"


@dataclass(frozen=True)
class WeightViews:
    """The tensors of a checkpoint, and the pieces of them, by name."""

    checkpoint: Checkpoint
    table: Mapping[str, WeightView]

    def load(self, name: str) -> torch.Tensor:
        piece = self.table.get(name)
        if piece is None:
            return self.checkpoint.load(name)
        part = self.checkpoint.load(piece.source, piece.at(self.checkpoint.shape(piece.source)))
        return part.t().contiguous() if piece.transposed else part


def cut_weights(module: GraphModule, weights: set[str]) -> dict[str, WeightView]:
    """Rewrite a traced graph, in place.

    Args:
        weights: names of the tensors that come from a checkpoint.

    Returns:
        The pieces by the names under which the graph reads them now.
    """
    graph = module.graph
    table: dict[str, WeightView] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in weights:
            _follow(module, node, WeightView(tensor_name(node)), table)
    for node in list(graph.nodes):
        if (product := _match_product(node)) is not None:
            _as_linear(module, node, *product, weights, table)
    graph.eliminate_dead_code()
    return {name: piece for name, piece in table.items() if piece != WeightView(name)}


def moved(table: Mapping[str, WeightView], prefix: str, to: str) -> dict[str, WeightView]:
    """The same pieces of another layer's weights; prefix, to: module paths of the layers, with a dot behind."""
    return {
        to + name.removeprefix(prefix): replace(piece, source=to + piece.source.removeprefix(prefix))
        for name, piece in table.items()
        if name.startswith(prefix) and piece.source.startswith(prefix)
    }


def _follow(module: GraphModule, node: Node, piece: WeightView, table: dict[str, WeightView]) -> None:
    """Replace what a graph makes of a weight, or of a piece of one, by pieces."""
    for user in list(node.users):
        taken = Select.match(user)
        if taken is not None and taken.dim == 0 and isinstance(taken.index, int) and _is_stack(node):
            part = _read(module, user, replace(piece, index=taken.index), table)
        elif (count := _stacked(node, user)) and piece == WeightView(piece.source):
            for each in list(user.users):
                number = bind(each).index
                part = _read(module, each, replace(piece, index=number, stacked=count), table)
                each.replace_all_uses_with(part)
                module.graph.erase_node(each)
                _follow(module, part, table[tensor_name(part)], table)
            module.graph.erase_node(user)
            continue
        elif _transposes(user) and len(node.users) == 1:
            part = _read(module, user, replace(piece, transposed=not piece.transposed), table)
        else:
            continue
        user.replace_all_uses_with(part)
        module.graph.erase_node(user)
        _follow(module, part, table[tensor_name(part)], table)


def _is_stack(node: Node) -> bool:
    """A tensor of matrices, or of biases, of which every reader takes one."""
    taken = [Select.match(user) for user in node.users]
    return all(part is not None and isinstance(part.index, int) for part in taken)


def _stacked(node: Node, user: Node) -> int:
    """How many matrices, one below another, a reader makes of a weight, of which every reader takes one; else 0."""
    if Reshape.match(user) is None or not _is_stack(user):
        return 0
    whole, parts = node.meta["val"].shape, user.meta["val"].shape
    alike = len(parts) == len(whole) + 1 and parts[0] * parts[1] == whole[0] and parts[2:] == whole[1:]
    return int(parts[0]) if alike else 0


def _transposes(node: Node) -> bool:
    if not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dim() != 2:
        return False
    if is_call(node, aten.t.default, aten.numpy_T.default):
        return True
    if (turned := Transpose.match(node)) is not None:
        return {turned.dim0 % 2, turned.dim1 % 2} == {0, 1}
    permuted = Permute.match(node)
    return permuted is not None and [axis % 2 for axis in permuted.dims] == [1, 0]


def _read(module: GraphModule, at: Node, piece: WeightView, table: dict[str, WeightView]) -> Node:
    """A get_attr node for a piece, in front of `at`."""
    tensor = piece.of(get_tensor(module, piece.source))
    name = piece.name(tensor.dim())
    if name != piece.source:
        set_tensor(module, name, tensor)
    with module.graph.inserting_before(at):
        node = module.graph.get_attr(name)
    node.meta = {"val": tensor, Meta.MODULE_PATH: at.meta.get(Meta.MODULE_PATH, "")}
    table[name] = piece
    return node


def _match_product(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(x, weight, bias or None) of a product, of which one factor may be a weight."""
    if (product := Matmul.match(node)) is not None:
        return product.x, product.weight, None
    if is_call(node, aten.mm.default):
        given = bind(node)
        return given.self, given.mat2, None
    if is_call(node, aten.addmm.default) and not node.kwargs:
        given = bind(node)
        return given.mat1, given.mat2, given.self
    return None


def _as_linear(
    module: GraphModule,
    node: Node,
    x: Node,
    weight: Node,
    bias: Node | None,
    weights: set[str],
    table: dict[str, WeightView],
) -> None:
    """x @ W or b + x @ W with a weight W of its own: linear(x, W^T, b)."""
    if weight.op != "get_attr" or x.op == "get_attr":
        return
    name = tensor_name(weight)
    if not (name in table or name in weights) or weight.meta["val"].dim() != 2 or len(weight.users) != 1:
        return
    if bias is not None and (bias.op != "get_attr" or bias.meta["val"].dim() != 1):
        return
    piece = table.get(name, WeightView(name))
    turned = _read(module, node, replace(piece, transposed=not piece.transposed), table)
    given = (x, turned) if bias is None else (x, turned, bias)
    with module.graph.inserting_before(node):
        linear = module.graph.call_function(aten.linear.default, given)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    module.graph.erase_node(node)
