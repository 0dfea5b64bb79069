"""Operators from codes to codes, written as floats between roundings, which ONNX Runtime puts together again.

QLinearConv and QGemm make codes that the next one reads; written so, each has a result that can be looked at.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ...runtime.tensors import tensor_of

_OWN = "qexport/"


# Without it ONNX Runtime makes uint8 of int8 values in some places on x64, and does not put all of them together.
SESSION = {"session.qdqisint8allowed": "1"}


def as_quantized_values(graph: GraphProto, folder: Path) -> bool:
    """Rewrite every such operator whose scales are constants, in place.

    Args:
        folder: with the data of tensors.

    Returns:
        Whether there were any; a session on the graph then takes the entries `SESSION`.
    """
    found = False
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        read = _READERS.get(node.op_type)
        form = read(node) if read is not None else None
        if form is not None and {form.x[1], form.w[0], form.w[1], form.y[0]} <= tensors.keys():
            nodes += form.nodes(node, graph, tensors, folder)
            found = True
        else:
            own = NodeProto()
            own.CopyFrom(node)
            nodes.append(own)
    del graph.node[:]
    graph.node.extend(nodes)
    return found


@dataclass(frozen=True)
class _Form:
    """The parts of such an operator.

    Attributes:
        operator: of floats.
        x, w: names of codes, scale and zero point; y: of scale and zero point; bias: of its int32 codes, or empty.
        axis: of the weight, along which its scales are.
        kept: attributes that the operator of floats has too; None for all.
    """

    operator: str
    x: Sequence[str]
    w: Sequence[str]
    y: Sequence[str]
    bias: str
    axis: int
    kept: Set[str] | None = None

    def nodes(
        self, node: NodeProto, graph: GraphProto, tensors: Mapping[str, TensorProto], folder: Path
    ) -> list[NodeProto]:
        """The roundings and the product in the place of a node; a scale of its bias is added to the graph."""
        name, result = node.name, f"{_OWN}{node.name}.result"
        inputs = [f"{_OWN}{name}.{part}" for part in ("x", "w")]
        made = [
            helper.make_node("DequantizeLinear", self.x, inputs[:1], f"{name}/x"),
            helper.make_node("DequantizeLinear", self.w, inputs[1:], f"{name}/w", axis=self.axis),
        ]
        if self.bias:
            scale = tensor_of(tensors[self.x[1]], folder) * tensor_of(tensors[self.w[1]], folder)
            kept = f"{_OWN}{name}.bias_scale"
            graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), kept))
            inputs.append(f"{_OWN}{name}.b")
            made.append(helper.make_node("DequantizeLinear", [self.bias, kept], inputs[2:], f"{name}/b", axis=0))
        product = helper.make_node(self.operator, inputs, [result], name)
        product.attribute.extend(a for a in node.attribute if self.kept is None or a.name in self.kept)
        return [*made, product, helper.make_node("QuantizeLinear", [result, *self.y], list(node.output), f"{name}/y")]


def _convolution(node: NodeProto) -> _Form:
    given = [*node.input, ""]
    return _Form("Conv", given[:3], given[3:6], given[6:8], given[8], 0)


def _gemm(node: NodeProto) -> _Form | None:
    given = [*node.input, *[""] * 9][:9]
    if not given[7]:  # it makes floats
        return None
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return _Form("Gemm", given[:3], given[3:6], given[7:9], given[6], 0 if turned else 1, {"alpha", "transA", "transB"})


_READERS: dict[str, Callable[[NodeProto], _Form | None]] = {"QLinearConv": _convolution, "QGemm": _gemm}
