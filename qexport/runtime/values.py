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


_ARRAYS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def value_of(array: np.ndarray, type_name: str) -> ort.OrtValue:
    """An array as a tensor on the CPU of the type that a session names, rounded to it."""
    if type_name != "tensor(bfloat16)":
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, _ARRAYS[type_name]))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(rounded.view(np.int16), TensorProto.BFLOAT16)


def array_of(value: ort.OrtValue) -> np.ndarray:
    """A tensor on the CPU as an array: its own memory, or a float32 copy of bfloat16, which float32 holds exactly."""
    if value.data_type() != "tensor(bfloat16)":
        return np.from_dlpack(value)
    bits = np.empty(value.shape(), np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return (bits.astype(np.uint32) << 16).view(np.float32)
