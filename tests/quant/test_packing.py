"""Packing: round trips, and the bytes that ONNX and the kernels of ONNX Runtime expect."""

import numpy
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.quant.packing import (
    pack_high_first,
    pack_int4,
    pack_rows,
    stored_block,
    unpack_high_first,
    unpack_int4,
    unpack_rows,
)


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


@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_are_packed_one_by_one_from_the_lowest_bits(bits, data):
    width, rows = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=width * rows, max_size=width * rows))
    packed = pack_rows(torch.tensor(values, dtype=torch.uint8).view(rows, width), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (width * bits + 7) // 8)
    for row, codes in enumerate(torch.tensor(values).view(rows, width).tolist()):
        number = sum(code << (bits * place) for place, code in enumerate(codes))
        assert int.from_bytes(bytes(packed[row].tolist()), "little") == number
    assert unpack_rows(packed, bits, width).flatten().tolist() == values


def test_rows_keep_the_dimensions_in_front():
    codes = torch.arange(48, dtype=torch.uint8).view(2, 3, 8) % 4
    assert torch.equal(pack_rows(codes, 2).view(6, 2), pack_rows(codes.view(6, 8), 2))
    assert torch.equal(pack_rows(codes.transpose(0, 1), 2), pack_rows(codes, 2).transpose(0, 1))


def test_the_first_of_two_codes_is_in_the_high_nibble():
    codes = torch.tensor([[1, 2], [15, 0]], dtype=torch.uint8)
    assert pack_high_first(codes).tolist() == [0x12, 0xF0]
    assert pack_high_first(codes.t()).tolist() == [0x1F, 0x20]
    assert unpack_high_first(pack_high_first(codes), 3).tolist() == [1, 2, 15]


@pytest.mark.parametrize(
    "bits, group_size, block", [(4, 1024, 256), (8, 256, 256), (4, 16, 16), (2, 512, 128), (2, 64, 64)]
)
def test_blocks_of_the_file_divide_groups(bits, group_size, block):
    assert stored_block(bits, group_size) == block and group_size % block == 0
