"""Memory that is made for a session."""

import ctypes

import pytest
from onnx import TensorProto

from qexport.runtime.values import array_of, zeros


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8])
def test_new_memory_is_zero_whatever_was_there_before(kind):
    for _ in range(20):
        used = zeros([2, 3, 500, 8], kind, "cpu")
        ctypes.memset(used.data_ptr(), 7, used.tensor_size_in_bytes())
        del used
        assert not array_of(zeros([2, 3, 500, 8], kind, "cpu")).any()
    assert array_of(zeros([2, 3, 0, 8], kind, "cpu")).shape == (2, 3, 0, 8)
