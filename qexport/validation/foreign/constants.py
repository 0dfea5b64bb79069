"""Values of a file that depend on no input: weights in whatever form a tool left them, computed by ONNX Runtime."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from ...artifact.manifest import CPU
from ...runtime.session import ModelInFolder, start
from ...runtime.tensors import tensor_of
from .working_copy import copied

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
BITS: dict[int, int] = {
    TensorProto.INT2: 2, TensorProto.UINT2: 2, TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8,
    TensorProto.UINT8: 8, TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16, TensorProto.DOUBLE: 64, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E5M2: 8,
    TensorProto.BOOL: 8, TensorProto.FLOAT4E2M1: 4,
}  # fmt: skip
CODES = {
    TensorProto.INT2, TensorProto.UINT2, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8,
}  # fmt: skip
_AS_FLOAT = "qexport/as_float"


class FileGraph:
    """The graph of a working copy, to look things up in.

    Attributes:
        model: without its data; folder: where that is.
        makers: the node behind a value, by its name; readers: those in front of it; order: of nodes, by name.
        tensors: initializers by name.
    """

    def __init__(self, model: ModelProto, folder: Path):
        self.model, self.folder = model, folder
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = {}
        self.order: dict[str, int] = {}
        self._constant = set(self.tensors)
        for index, node in enumerate(model.graph.node):
            self.order[node.name] = index
            self.makers |= {name: node for name in node.output if name}
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
            if self._folds(node):
                self._constant.update(node.output)

    def _folds(self, node: NodeProto) -> bool:
        branches = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        return not branches and node.op_type not in _RANDOM and all(n in self._constant for n in node.input if n)

    def constant(self, value: str) -> bool:
        """Whether a value depends on no input."""
        return value in self._constant

    def behind(self, value: str) -> Iterator[NodeProto]:
        """The nodes that make a constant, in order."""
        found, waiting = {}, [value]
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is not None and node.name not in found:
                found[node.name] = node
                waiting += node.input
        yield from sorted(found.values(), key=lambda node: self.order[node.name])

    def sources(self, value: str) -> list[TensorProto]:
        """The tensors that a constant is made of, the longest first."""
        names = dict.fromkeys([value, *(name for node in self.behind(value) for name in node.input)])
        found = [self.tensors[name] for name in names if name in self.tensors]
        return sorted(found, key=lambda tensor: -np.prod(tensor.dims, dtype=np.int64))

    def array(self, value: str) -> np.ndarray:
        """An initializer's values, or those of a computed constant as float32."""
        tensor = self.tensors.get(value)
        return self.evaluate(value).numpy() if tensor is None else tensor_of(tensor, self.folder)

    def evaluate(self, value: str, instead: Mapping[str, TensorProto] | None = None) -> Tensor:
        """A constant as float32.

        Args:
            instead: tensors in the place of initializers, by name.
        """
        nodes = list(self.behind(value))
        names = dict.fromkeys([value, *(name for node in nodes for name in node.input)])
        part = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        part.graph.name = "constant"
        part.graph.node.extend(copied(node) for node in nodes)
        part.graph.node.append(helper.make_node("Cast", [value], [_AS_FLOAT], _AS_FLOAT, to=TensorProto.FLOAT))
        part.graph.initializer.extend(
            (instead or {}).get(name) or self.tensors[name] for name in names if name in self.tensors
        )
        part.graph.output.append(helper.make_tensor_value_info(_AS_FLOAT, TensorProto.FLOAT, None))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = start(ModelInFolder(self.folder, part.SerializeToString()), options, CPU)
        return torch.from_numpy(session.run([_AS_FLOAT], {})[0])

    def bytes(self, values: list[str]) -> int:
        """What the tensors take that these constants are made of."""
        found = {tensor.name: tensor for value in values if value for tensor in self.sources(value)}
        return sum(int(np.prod(t.dims, dtype=np.int64)) * BITS.get(t.data_type, 32) // 8 for t in found.values())


def attribute(node: NodeProto, name: str, default=None):
    """An attribute of a node, or what it is by default."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def filled(like: TensorProto, code: int) -> TensorProto:
    """A tensor of the same type and shape, all of it one code."""
    count = int(np.prod(like.dims, dtype=np.int64))
    bits = BITS[like.data_type]
    byte = sum((code & (1 << bits) - 1) << shift for shift in range(0, 8, bits))
    return TensorProto(
        name=like.name, dims=like.dims, data_type=like.data_type, raw_data=bytes([byte]) * -(-count * bits // 8)
    )
