"""Tensors on their way into ONNX Runtime and out of it, for numpy, which has no bfloat16."""

import ctypes

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

# Element types of ONNX, by the names that a session has for types.
ELEMENT_TYPES = {
    "tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16, "tensor(int8)": TensorProto.INT8, "tensor(uint8)": TensorProto.UINT8,
}  # fmt: skip


def array_of(value: ort.OrtValue) -> np.ndarray:
    """A tensor on the CPU as an array: its own memory, or a float32 copy of bfloat16, which float32 holds exactly."""
    if value.data_type() != "tensor(bfloat16)":
        return np.from_dlpack(value)
    bits = np.empty(value.shape(), np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return (bits.astype(np.uint32) << 16).view(np.float32)
