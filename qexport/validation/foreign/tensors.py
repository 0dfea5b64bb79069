"""Gains, biases and embeddings of a file beside the float model's: found by their values, and where not, by names."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ...capture.graph import CapturedModel
from ...graph.convolution_sites import products
from ...runtime.tensors import tensor_of
from .constants import FileGraph

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_LEAST, _MOST = 8, 1 << 27  # elements of a tensor that is compared
_CLOSE = 0.02  # relative; bfloat16 leaves 0.004
_NUMBER = re.compile(r"\d+")


def tensor_faults(captured: CapturedModel, graph: FileGraph) -> tuple[str, ...]:
    """Sentences on tensors whose name the file has, with other values.

    A tensor that goes by no name of the float model's says nothing: it may be folded into another.
    """
    weights = {found.weight for block in captured.blocks for found in products(block.module.graph)}
    names = [
        name for block in captured.blocks for name in block.parameters
        if name not in captured.constants and name not in weights
    ]  # fmt: skip
    there: dict[int, list[TensorProto]] = {}
    for tensor in graph.tensors.values():
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_type in _FLOATS and _LEAST <= count <= _MOST:
            there.setdefault(count, []).append(tensor)
    said = []
    for name in dict.fromkeys(names):
        want = captured.load(name).float().flatten()
        tensor = _named(name, there.get(want.numel(), ()))
        if tensor is None:
            continue
        got = torch.from_numpy(tensor_of(tensor, graph.folder).astype(np.float32)).flatten()
        if not any(_close(one, got) for one in (want, want + 1)):  # some norms multiply by 1 and their gain
            said.append(f"{name}: {_difference(want, got)}")
    return tuple(said)


def _named(name: str, tensors: Sequence[TensorProto]) -> TensorProto | None:
    """The tensor of that name, or the only one with its numbers and its last two words."""
    exact = next((tensor for tensor in tensors if tensor.name == name), None)
    return exact if exact is not None else _only(t for t in tensors if _words(t.name) == _words(name))


def _only(tensors: Iterable[TensorProto]) -> TensorProto | None:
    found = list(tensors)
    return found[0] if len(found) == 1 else None


def _words(name: str) -> tuple[list[str], list[str]]:
    return _NUMBER.findall(name), name.split(".")[-2:]


def _close(want: Tensor, got: Tensor) -> bool:
    return float((want - got).norm()) <= _CLOSE * float(want.norm())


def _difference(want: Tensor, got: Tensor) -> str:
    alike = float(torch.nn.functional.cosine_similarity(want, got, dim=0))
    gain = float((want * got).sum() / want.square().sum().clamp_min(1e-30))
    if alike > 0.99:
        return f"it is {gain:.3g} times the float model's"
    return f"it is not the float model's: their cosine is {alike:.2f}"
