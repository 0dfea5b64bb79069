"""bfloat16 files on the CPU provider, which has few such kernels: every node between casts.

A node computes in float32 and what it makes is rounded to bfloat16, which is what a bfloat16 kernel promises. Names,
initializers and the interface stay what they are.
"""

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from qexport.artifact import checksums
from qexport.artifact.manifest import MODEL_FILE

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
_CODES = 1, 2  # outputs of GroupQueryAttention that are codes where its caches are


def widen(folder: Path) -> Path:
    """Rewrite the model of an export in place; returns the folder."""
    path = folder / MODEL_FILE
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    half = {t.name for t in graph.initializer if t.data_type == BFLOAT16}
    half |= {v.name for v in graph.input if v.type.tensor_type.elem_type == BFLOAT16}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _widened(node, half)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
    checksums.write(folder)
    return folder


def _widened(node: NodeProto, half: set[str]) -> list[NodeProto]:
    """The node between casts; half: names of bfloat16 values, gets those it makes."""
    if node.op_type == "Cast":
        half.update(node.output if node.attribute[0].i == BFLOAT16 else ())
        return [node]
    if node.op_type == "Shape" or not half.intersection(node.input):
        return [node]
    before, after = [], []
    codes = _CODES if node.op_type == "GroupQueryAttention" and node.input[3] not in half else ()
    for index, name in enumerate(node.input):
        if name in half:
            wide = f"{name}:into:{node.name}:{index}"
            before.append(helper.make_node("Cast", [name], [wide], to=FLOAT))
            node.input[index] = wide
    for index, name in enumerate(node.output):
        if name and index not in codes:
            half.add(name)
            node.output[index] = f"{name}:wide"
            after.append(helper.make_node("Cast", [f"{name}:wide"], [name], to=BFLOAT16))
    return [*before, node, *after]
