"""Small ONNX models to place: fp16, three-dimensional activations, symbolic batch and lengths."""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.helper import make_graph, make_model, make_opsetid, make_tensor, make_tensor_value_info

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ALL_ON_CUDA = {"session.disable_cpu_ep_fallback": "1"}
DIMS = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5, "total_sequence_length": 8}
PROMPT = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 0, "total_sequence_length": 3}


def value(name: str, dtype: int, *shape: int | str) -> ValueInfoProto:
    return make_tensor_value_info(name, dtype, shape)


def tensor(name: str, data, dtype: type) -> TensorProto:
    return numpy_helper.from_array(np.asarray(data, dtype), name)


def int4(name: str, *shape: int) -> TensorProto:
    return make_tensor(name, TensorProto.INT4, shape, np.arange(np.prod(shape)) % 15 - 7)


def model(
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    initializers: list[TensorProto] = (),
    opset: int = 23,
) -> ModelProto:
    opsets = [make_opsetid("", opset), make_opsetid("com.microsoft", 1)]
    graph = make_graph(nodes, "graph", inputs, outputs, list(initializers))
    built = make_model(graph, opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(built)
    return built


def assert_all_on_cuda(placed: dict, ops: dict[str, int]) -> None:
    """Exactly these ops, every one on CUDA; a copy would be one of them."""
    assert placed["nodes"] == {CUDA: ops}


def assert_decoder_on_cuda(placed: dict) -> None:
    """Every node of a decoder is on CUDA, but for one that hands a length to attention, which wants it on the CPU."""
    assert set(placed["nodes"]) == {CUDA, CPU} and placed["nodes"][CPU] == {"Cast": 1}
    assert placed["memcpy"] == 0
