"""4-bit packing: round trips, and the bytes that ONNX expects."""

import numpy
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.numerics.packing import pack_int4, unpack_int4


def test_low_nibble_comes_first_and_an_odd_count_is_padded():
    assert pack_int4(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x21, 0x03]
    assert pack_int4(torch.tensor([[-1, 7], [-8, 0]], dtype=torch.int8)).tolist() == [0x7F, 0x08]


@settings(max_examples=50, deadline=None)
@given(st.booleans(), st.lists(st.integers(0, 15), max_size=33))
def test_round_trip(signed, values):
    codes = torch.tensor(values, dtype=torch.uint8)
    codes = codes.to(torch.int8).sub_(8) if signed else codes
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == (len(values) + 1) // 2
    again = unpack_int4(packed, tuple(codes.shape), signed)
    assert again.dtype == codes.dtype and torch.equal(again, codes)


def test_packing_follows_the_logical_order_of_a_transposed_tensor():
    codes = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    assert torch.equal(unpack_int4(pack_int4(codes.t()), (5, 3), False), codes.t())


@pytest.mark.parametrize("signed", [True, False])
def test_onnx_reads_the_same_codes(signed):
    codes = torch.arange(16, dtype=torch.uint8)[:15].view(3, 5)
    codes = codes.to(torch.int8).sub_(8) if signed else codes
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    tensor = onnx.helper.make_tensor("codes", kind, (3, 5), pack_int4(codes).numpy().tobytes(), raw=True)
    assert numpy.array_equal(onnx.numpy_helper.to_array(tensor).astype(numpy.int32), codes.numpy())
