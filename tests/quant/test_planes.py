"""Codes in planes: no bit more than they have, and what tables make of them is what kernels read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qexport.quant.packing import pack_rows
from qexport.quant.planes import plane_bits, split, tables

KERNELS = [(3, 4), (3, 8), (5, 8), (6, 8), (4, 4), (2, 4)]


@pytest.mark.parametrize(("bits", "wide"), KERNELS)
@given(data=st.data(), signed=st.booleans())
def test_tables_put_together_what_a_kernel_reads(bits, wide, data, signed):
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=16, max_size=16)
    codes = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=3)), dtype=torch.uint8)
    planes = split(codes, bits)
    assert sum(plane.numel() for plane in planes) * 8 == codes.numel() * bits
    joined = torch.zeros(len(codes), 16 * wide // 8, dtype=torch.uint8)
    for plane, table in zip(planes, tables(bits, wide, signed), strict=True):
        more = table[plane.int()].flatten(1)
        assert not (joined & more).any()
        joined |= more
    # What stands for -2^(b - 1) of b bits stands for -2^(b - 1) of the kernel's, too.
    moved = codes.int() - 2 ** (bits - 1) + 2 ** (wide - 1) if signed else codes.int()
    assert torch.equal(joined, pack_rows(moved.to(torch.uint8), wide))


def test_planes_are_the_powers_of_two_of_a_number():
    assert [plane_bits(bits) for bits in (2, 3, 4, 5, 6, 8)] == [(2,), (2, 1), (4,), (4, 1), (4, 2), (8,)]
