"""Convolutions with constant weights, found by dataflow, and zeros added in front of them."""

from math import prod

import torch
from torch.fx import Graph, Node

from .edit import is_call, owner_of
from .schema import bind
from .sites import Linear, linears
from .views import Convolution, sizes_of, tensor_name

aten = torch.ops.aten

CONVOLUTIONS = Convolution.targets


def convolutions(graph: Graph) -> dict[str, Node]:
    """Convolutions with constant weights by the path of their module, in order."""
    found = [(node, made.weight) for node in graph.nodes if (made := Convolution.match(node)) is not None]
    return {owner_of(tensor_name(weight)): node for node, weight in found if weight.op == "get_attr"}


def products(graph: Graph) -> list[Linear]:
    """Linears and convolutions, in order. A convolution is the linear of what its filters lie on: its weight has the
    shape (filters, numbers in one).
    """
    found = {linear.node: linear for linear in linears(graph)}
    for name, node in convolutions(graph).items():
        made = Convolution.of(node)
        bias = tensor_name(made.bias) if made.bias is not None and made.bias.op == "get_attr" else None
        filters, *sizes = sizes_of(made.weight)
        found[node] = Linear(name, node, tensor_name(made.weight), bias, (filters, prod(sizes)))
    return [found[node] for node in graph.nodes if node in found]


def zero_padding(node: Node, rank: int) -> tuple[list[int], list[int]] | None:
    """What a node adds of zeros before and behind each of the last `rank` dimensions; None where it is no such padding.

    Convolutions pad with zeros themselves, and the zero of a quantized input is exact.
    """
    if not is_call(node, aten.constant_pad_nd.default, aten.pad.default):
        return None
    given = bind(node)
    if getattr(given, "mode", "constant") != "constant" or given.value not in (None, 0):
        return None
    if not all(isinstance(pad, int) and pad >= 0 for pad in given.pad):
        return None
    # Pairs for the last dimension, the one before it, and so on.
    pads = [*given.pad, *[0] * (2 * rank - len(given.pad))]
    if any(pads[2 * rank :]):
        return None
    return pads[0 : 2 * rank : 2][::-1], pads[1 : 2 * rank : 2][::-1]
