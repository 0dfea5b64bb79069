"""Writing an ONNX model: the graph in one file, its tensors in another."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from ..artifact import manifest as manifests
from .emitter import VIEW_OF, name_of, reread


def write_model(folder: Path, model: ir.Model, progress: Callable[[int, int], None]) -> int:
    """Save model.onnx with its tensors in model.onnx.data; returns the bytes of both.

    An initializer that is a view of another points at the other's bytes: ONNX Runtime maps them into memory once, where
    a Reshape in the graph would be folded into a copy when the session is made.
    """
    initializers = model.graph.initializers
    views = {value: initializers[value.meta[VIEW_OF]] for value in initializers.values() if VIEW_OF in value.meta}
    for value in views:
        value.const_value = None  # what has no data yet is not written
    ir.external_data.unload_from_model(
        model, folder, f"{manifests.MODEL_FILE}.data",
        size_threshold_bytes=256,  # ONNX Runtime reads shape constants while it loads and wants them in the file
        callback=lambda _tensor, info: progress(info.index + 1, info.total),
    )  # fmt: skip
    for value, source in views.items():
        value.const_value = _reshaped(source, value)
    for value in initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value.tobytes()  # an error of ours is raised here, and wrapped into another by what follows
    ir.save(model, folder / manifests.MODEL_FILE)
    return sum(p.stat().st_size for p in folder.iterdir())


def _reshaped(source: ir.Value, value: ir.Value) -> ir.TensorProtocol:
    tensor, shape, name, dtype = source.const_value, value.shape, name_of(value), value.dtype
    if tensor is None or shape is None or dtype is None:
        raise TypeError(f"{name} is a view of {source.name}, and one of them is no initializer")
    if not isinstance(tensor, ir.ExternalTensor):
        return reread(tensor, dtype, shape.numpy(), name)
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, dtype,
        shape=shape, name=name, base_dir=tensor.base_dir,
    )  # fmt: skip
