"""The convolutions with a constant weight in a file as products, see there: the weight is [filters, numbers in one]."""

from dataclasses import replace

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

from .constants import FileGraph, attribute
from .products import Product, Reader, Weight, constant_weight, made_by, scale_behind


def _conv(graph: FileGraph, node: NodeProto) -> Product | None:
    weight = constant_weight(graph, node.input[1], transposed=True)
    if weight is None or graph.constant(node.input[0]):
        return None
    made = made_by(graph, node, weight)
    return made if made.quantized else _with_norm(graph, made)


def _with_norm(graph: FileGraph, made: Product) -> Product:
    """A convolution with the batch norm behind it, which the float model has in its weight."""
    readers = graph.readers.get(made.output, [])
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization":
        return made
    norm = readers[0]
    if not all(graph.constant(name) for name in norm.input[1:]):
        return made

    def gains() -> Tensor:
        gain, variance = (torch.from_numpy(graph.array(norm.input[at]).astype(np.float32)) for at in (1, 4))
        return (gain / torch.sqrt(variance + attribute(norm, "epsilon", 1e-5)))[:, None]

    plain = made.weight.read
    return replace(made, output=norm.output[0], weight=replace(made.weight, read=lambda: plain() * gains()))


def _conv_integer(graph: FileGraph, node: NodeProto) -> Product | None:
    """As `quantize_dynamic` writes it: the scales are multiplied behind."""
    codes, zero = node.input[1], node.input[3] if len(node.input) > 3 else ""
    tensor, scale = graph.tensors.get(codes), scale_behind(graph, node.output[0])
    if tensor is None or not scale:
        return None
    shape = int(tensor.dims[0]), int(np.prod(tensor.dims[1:], dtype=np.int64))

    def steps() -> Tensor:
        return torch.from_numpy(graph.array(scale).astype(np.float32)).reshape(-1, 1).expand(shape)

    def read() -> Tensor:
        points = torch.from_numpy(graph.array(zero).astype(np.float32)).reshape(-1, 1) if zero else 0.0
        return (torch.from_numpy(graph.array(codes).astype(np.float32)).flatten(1) - points) * steps()

    weight = Weight(shape, read, 8, steps, 0, bool(zero), graph.bytes([codes, scale, zero]), (codes, scale))
    return made_by(graph, node, weight)


CONVOLUTIONS: dict[str, Reader] = {"Conv": _conv, "ConvInteger": _conv_integer}
