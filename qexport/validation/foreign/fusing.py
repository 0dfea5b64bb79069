"""What ONNX Runtime asks of a product of codes between roundings, to make one operator of all of it."""

import numpy as np
from onnx import NodeProto

from .constants import FileGraph


def why_float(graph: FileGraph, node: NodeProto, activations: str) -> str:
    """Why a Conv or a Gemm stays one of floats, in words; empty where nothing is known.

    Args:
        activations: how its input is rounded, "" for not at all.
    """
    if not activations:
        return "nothing rounds its input"
    behind = _only_reader(graph, node.output[0])
    if behind is not None and behind.op_type in ("Relu", "Clip"):
        behind = _only_reader(graph, behind.output[0])
    if behind is None or behind.op_type != "QuantizeLinear":
        return "nothing rounds its result"
    zero = graph.array(behind.input[2]) if len(behind.input) > 2 and graph.constant(behind.input[2]) else None
    if zero is not None and zero.dtype == np.int8:
        return (
            "its values are int8, of which ONNX Runtime makes uint8 in some places on x64, and then they do not fit; "
            "uint8 values fuse, and int8 ones with the session entry session.qdqisint8allowed"
        )
    return ""


def _only_reader(graph: FileGraph, value: str) -> NodeProto | None:
    readers = graph.readers.get(value, [])
    return readers[0] if len(readers) == 1 else None
