"""Rotary embedding for an operator that does it itself: what is rotated, and by which constant tables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..capture.blocks import Block
from ..graph.edit import shape_of
from ..graph.views import Cat, RotaryEmbedding, Slice, results_of, size_at, tensor_name

_LARGEST = 1 << 26  # bytes; a model with more positions than fit rotates outside of attention


@dataclass(frozen=True)
class RotatedHeads:
    """A value whose first features of every head are rotated.

    Attributes:
        x: the value before, [batch, heads, sequence, head_dim].
        cos, sin: [batch, sequence, rotated features / 2].
    """

    x: Node
    cos: Node
    sin: Node


def rotated(node: Node) -> RotatedHeads | None:
    """What a node rotates: all features, or the first ones with the others put behind them again."""
    if (whole := RotaryEmbedding.match(node)) is not None:
        return RotatedHeads(whole.x, whole.cos, whole.sin)
    joined = Cat.match(node)
    if joined is None or len(joined.tensors) != 2 or joined.dim not in (-1, 3):
        return None
    turned, kept = RotaryEmbedding.match(joined.tensors[0]), Slice.match(joined.tensors[1])
    if turned is None or kept is None or kept.dim not in (-1, 3):
        return None
    x, width = kept.x, size_at(turned.x, -1)
    start, end = kept.bounds
    if start != width or isinstance(end, Node) or end < size_at(x, -1):
        return None
    first = Slice.match(turned.x)
    beside = first is not None and first.x is x and first.dim in (-1, 3) and first.bounds == (0, width)
    return RotatedHeads(x, turned.cos, turned.sin) if turned.x is x or beside else None


def position_table(
    block: Block, value: str, position_ids: str, length: int, read: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """A value that depends on the position alone, for the positions from 0 on.

    Args:
        block: makes the value [batch, sequence, n] from position_ids.
        length: number of positions.
        read: the block's tensors by name.

    Returns:
        [length, n], or None where the value depends on more than positions (a scaling by the length of the text).
    """
    graph = block.module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = dict(zip(placeholders, block.inputs, strict=True))
    results = dict(zip(block.outputs, results_of(graph), strict=True))
    if value not in results:
        return None
    nodes = ancestors(results[value])
    if any(node.op == "placeholder" and names[node] != position_ids for node in nodes):
        return None
    width = size_at(results[value], -1)
    if len(shape_of(results[value])) != 3 or 4 * length * width > _LARGEST or width % 8:
        return None  # GroupQueryAttention wants tables of a multiple of 8 columns
    table = _run(nodes, torch.arange(length)[None], read)[0].contiguous()
    # A row that depends on the other positions too is none of a table.
    few = torch.tensor([[5, 0, min(7, length - 1)]]) % length
    return table if torch.equal(_run(nodes, few, read)[0], table[few[0]]) else None


def _run(nodes: list[Node], positions: torch.Tensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    known: dict[Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            known[node] = positions
        elif node.op == "get_attr":
            known[node] = read(tensor_name(node))
        elif callable(node.target):
            arguments, options = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            known[node] = node.target(*arguments, **options)
    table: torch.Tensor = known[nodes[-1]]
    return table


def ancestors(node: Node) -> list[Node]:
    """A node and all that it is made of, in the order of the graph."""
    found, waiting = {node}, [node]
    while waiting:
        fresh = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(fresh)
        waiting += fresh
    return sorted(found)
