"""Convolutions with constant weights, found by dataflow, and zeros added in front of them."""

import torch
from torch.fx import Graph, Node

from .edit import is_call, owner_of

aten = torch.ops.aten


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def convolutions(graph: Graph) -> dict[str, Node]:
    """Convolutions with constant weights by the path of their module, in order."""
    found = [n for n in graph.nodes if is_call(n, *CONVOLUTIONS) and n.args[1].op == "get_attr"]
    return {owner_of(n.args[1].target): n for n in found}


def zero_padding(node: Node, rank: int) -> tuple[list[int], list[int]] | None:
    """What a node adds of zeros before and behind each of the last `rank` dimensions; None where it is no such padding.

    Convolutions pad with zeros themselves, and the zero of a quantized input is exact.
    """
    if not is_call(node, aten.constant_pad_nd.default, aten.pad.default):
        return None
    pads, given = node.args[1], node.args[2:]
    mode, value = ("constant", *given) if given and not isinstance(given[0], str) else (*given, "constant", None)[:2]
    if mode != "constant" or value not in (None, 0) or not all(isinstance(pad, int) and pad >= 0 for pad in pads):
        return None
    pads = [*pads, *[0] * (2 * rank - len(pads))]  # pairs for the last dimension, the one before it, and so on
    if any(pads[2 * rank :]):
        return None
    return pads[0 : 2 * rank : 2][::-1], pads[1 : 2 * rank : 2][::-1]
