"""Recurrent layers that are one operator with the integer product of their input."""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.fx import Graph, Node

from ..artifact.manifest import STATIC_LSTM
from ..graph.edit import is_call
from ..graph.schema import bind
from ..graph.views import Add, DequantizeLinear, Matmul, QuantizeLinear
from .emitter import maker_of

ops = torch.ops.qexport


@dataclass(frozen=True)
class StaticProduct:
    """The product of a layer's input, in 8 bits with a static range.

    Attributes:
        product: the node.
        x: what is rounded, with the scale `step`.
        codes: int8 [K, N], with `scale` [N]; bias: [N], or None.
    """

    product: Node
    x: Node
    step: Node
    codes: Node
    scale: Node
    bias: Node | None


def static_product(gates: Node) -> StaticProduct | None:
    """The product that makes gates; None where it is of another form, or something is added to it besides a bias."""
    total = Add.match(gates)
    bias = None if total is None or not isinstance(total.other, Node) else total.other
    product = gates if total is None else total.x
    if (bias is not None and bias.op != "get_attr") or (found := Matmul.match(product)) is None:
        return None
    x, weight = DequantizeLinear.match(found.x), DequantizeLinear.match(found.weight)
    rounding = None if x is None else QuantizeLinear.match(x.codes)
    if rounding is None or weight is None or weight.bits != 8 or weight.block_size or weight.zero_point is not None:
        return None
    if not all(node.op == "get_attr" for node in (rounding.scale, weight.codes, weight.scale)):
        return None
    return StaticProduct(product, rounding.x, rounding.scale, weight.codes, weight.scale, bias)


def static_layers(graph: Graph) -> dict[Node, Node]:
    """The steps of the layers that are one operator, by the product of their input."""
    steps = [node for node in graph.nodes if is_call(node, ops.lstm_steps_int8.default)]
    found = [(static_product(bind(node).gates), node) for node in steps]
    return {made.product: node for made, node in found if made is not None}


def kernel_behind(outputs: ir.Value) -> ir.Node:
    """The node of a layer that is one operator, whose outputs are cut to the states that count."""
    node = maker_of(outputs)
    while node.op_type != STATIC_LSTM:
        if (value := node.inputs[0]) is None:
            raise TypeError(f"{outputs} comes from no {STATIC_LSTM}")
        node = maker_of(value)
    return node
