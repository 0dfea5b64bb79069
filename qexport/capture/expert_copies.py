"""Experts that were not traced: copies of the last one that was, each with its own weights and its own share.

torch.export spends a tenth of a second on an expert, and layers have hundreds of them that differ in nothing else.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..errors import CaptureError
from ..graph.edit import get_tensor, is_call, set_tensor
from ..graph.meta import Meta
from ..graph.schema import bind, rebind
from ..graph.views import Slice, tensor_name
from .weight_views import WeightView

aten = torch.ops.aten


def copy_experts(module: GraphModule, pieces: dict[str, WeightView]) -> None:
    """Replace every `more_experts` of a normalized graph by the experts that it stands for, in place.

    A copy is added to the sum before the next one is computed, so that no two parts wait for each other.

    Args:
        pieces: weights that are parts of the model's, by name; those of the copies are added.

    Raises:
        CaptureError: an expert reads its weights or its share in another way than by its number.
    """
    markers = [node for node in module.graph.nodes if is_call(node, torch.ops.qexport.more_experts.default)]
    for marker in markers:
        given = bind(marker)
        total, part, traced, count = given.total, given.part, given.traced, given.experts
        own = _own(part, traced - 1, count, marker.meta[Meta.MODULE_PATH], pieces)
        for number in range(traced, count):
            made = _copy(module, marker, own, number, pieces)
            with module.graph.inserting_before(marker):
                total = module.graph.call_function(aten.add.Tensor, (total, made[part]))
            total.meta = dict(marker.meta)
        marker.replace_all_uses_with(total)
        module.graph.erase_node(marker)


def _own(part: Node, index: int, count: int, owner: str, pieces: dict[str, WeightView]) -> list[Node]:
    """The nodes that are an expert's own, in order: what depends on its weights and its share, up to its result.

    Args:
        owner: path of the module of these experts: layers before it have experts too.
    """
    behind, waiting = set(), [part]
    while waiting:
        node = waiting.pop()
        if node not in behind:
            behind.add(node)
            waiting += node.all_input_nodes
    own: dict[Node, None] = {}
    weights = shares = 0
    for node in part.graph.nodes:
        if node not in behind:
            continue
        is_weight, is_share = _is_weight(node, index, owner, pieces), _is_share(node, index, count, owner)
        weights, shares = weights + is_weight, shares + is_share
        if is_weight or is_share or any(read in own for read in node.all_input_nodes):
            own[node] = None
    whole = any(_is_stack(node, count, owner) for node in behind)
    if not weights or whole or shares != 1:
        raise CaptureError(
            f"an expert reads {weights} weights and {shares} shares by its number"
            f"{', and the weights of all' if whole else ''}, which cannot be followed",
            place=owner,
        )  # fmt: skip
    return list(own)


def _is_weight(node: Node, index: int, owner: str, pieces: dict[str, WeightView]) -> bool:
    if node.op != "get_attr":
        return False
    piece = pieces.get(tensor_name(node))
    return piece is not None and piece.index == index and piece.source.startswith(f"{owner}.")


def _is_stack(node: Node, count: int, owner: str) -> bool:
    """Whether a node is the weights of all experts in one tensor, which are read in another way."""
    stacked = node.op == "get_attr" and node.meta["val"].dim() > 2 and node.meta["val"].shape[0] == count
    return stacked and tensor_name(node).startswith(f"{owner}.")


def _is_share(node: Node, index: int, count: int, owner: str) -> bool:
    taken = Slice.match(node) if node.meta.get(Meta.MODULE_PATH) == owner else None
    return taken is not None and taken.bounds == (index, index + 1) and taken.x.meta["val"].shape[taken.dim] == count


def _copy(
    module: GraphModule, before: Node, own: Sequence[Node], number: int, pieces: dict[str, WeightView]
) -> dict[Node, Node]:
    """Copies of an expert's own nodes for the expert of another number, by the node that each was made from."""
    made: dict[Node, Node] = {}
    with module.graph.inserting_before(before):
        for node in own:
            if node.op == "get_attr":
                made[node] = _weight(module, node, number, pieces)
                continue
            made[node] = module.graph.node_copy(node, lambda read: made.get(read, read))
            made[node].meta = dict(node.meta)
            if Slice.match(node) is not None and not any(read in made for read in node.all_input_nodes):
                rebind(made[node], start=number, end=number + 1)
    return made


def _weight(module: GraphModule, node: Node, number: int, pieces: dict[str, WeightView]) -> Node:
    piece = replace(pieces[tensor_name(node)], index=number)
    tensor = piece.of(get_tensor(module, piece.source))
    name = piece.name(tensor.dim())
    set_tensor(module, name, tensor)
    pieces[name] = piece
    copied = module.graph.get_attr(name)
    copied.meta = {**node.meta, "val": tensor}
    return copied
