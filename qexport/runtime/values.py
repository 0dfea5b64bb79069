"""Tensors on their way into ONNX Runtime and out of it, for numpy, which has no bfloat16."""

import ctypes
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from ..artifact.dtypes import FLOATS

# Element types of ONNX, by the names that a session has for types.
ELEMENT_TYPES = {
    **{kind.session: kind.onnx for kind in FLOATS.values()},
    **{"tensor(int8)": TensorProto.INT8, "tensor(uint8)": TensorProto.UINT8},
    "tensor(float8e4m3fn)": TensorProto.FLOAT8E4M3FN,
}
# What numpy does not have is the upper half of a float32 here.
_HALVES = {kind.session: kind.onnx for kind in FLOATS.values() if not kind.in_numpy}
_ARRAYS = {kind.session: kind.name for kind in FLOATS.values() if kind.in_numpy} | {"tensor(int64)": "int64"}


def value_of(array: np.ndarray, type_name: str) -> ort.OrtValue:
    """An array as a tensor on the CPU of the type that a session names, rounded to it."""
    if type_name not in _HALVES:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, _ARRAYS[type_name]))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(rounded.view(np.int16), _HALVES[type_name])


def zeros(shape: Sequence[int], kind: int, device: str) -> ort.OrtValue:
    """A tensor of zeros; kind: an element type of ONNX, device: as `provider.device_of` names it.

    New memory of a GPU holds what was there before. An attention kernel multiplies what lies behind the last token with
    a share of zero, and zero times a NaN is a NaN.
    """
    if device == "cpu":
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)
        ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
        return value
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device, 0)
    value.update_inplace(zeros(shape, kind, "cpu"))
    return value


def shortened(value: ort.OrtValue, length: int, kind: int, device: str) -> ort.OrtValue:
    """The first `length` tokens of a cache [batch, heads, tokens, size]; kind and device: as for `zeros`."""
    if device != "cpu":
        host = zeros(value.shape(), kind, "cpu")
        host.update_inplace(value)
        batch, heads, _, size = value.shape()
        short = ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, length, size], kind, device, 0)
        short.update_inplace(shortened(host, length, kind, "cpu"))
        return short
    batch, heads, tokens, size = value.shape()
    short = ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, length, size], kind)
    _bytes_of(short, batch * heads, length)[:] = _bytes_of(value, batch * heads, tokens)[:, : length]
    return short


def picked(value: ort.OrtValue, rows: Sequence[int], kind: int, device: str) -> ort.OrtValue:
    """Rows of a tensor [batch, ...], in any order and any of them several times; kind and device: as for `zeros`."""
    shape = [len(rows), *value.shape()[1:]]
    if device != "cpu":
        host = zeros(value.shape(), kind, "cpu")
        host.update_inplace(value)
        found = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device, 0)
        found.update_inplace(picked(host, rows, kind, "cpu"))
        return found
    found = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)
    if found.tensor_size_in_bytes():
        _bytes_of(found, len(rows), 1)[:] = _bytes_of(value, value.shape()[0], 1)[np.asarray(rows)]
    return found


def _bytes_of(value: ort.OrtValue, rows: int, tokens: int) -> np.ndarray:
    """The memory of a tensor on the CPU, whatever its type: uint8 [rows, tokens, bytes]."""
    memory = (ctypes.c_uint8 * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(memory, np.uint8).reshape(rows, tokens, -1)


def array_of(value: ort.OrtValue) -> np.ndarray:
    """A tensor on the CPU as an array: its own memory, or a float32 copy of bfloat16, which float32 holds exactly."""
    if value.data_type() not in _HALVES:
        return np.from_dlpack(value)
    bits = np.empty(value.shape(), np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return (bits.astype(np.uint32) << 16).view(np.float32)
