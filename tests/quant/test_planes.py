"""Codes in planes: no bit more than they have, and what tables make of them is what kernels read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.quant.packing import pack_rows
from qexport.quant.planes import plane_bits, split, tables, unsigned

KERNELS = [
    (3, 4, "signed"), (3, 4, "counted"), (5, 8, "signed"), (6, 8, "signed"), (6, 8, "counted"), (2, 8, "signed"),
    (4, 8, "signed"), (8, 8, "signed"), (1, 4, "odd"), (2, 4, "odd"), (3, 4, "odd"), (3, 8, "odd"),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "wide", "kind"), KERNELS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_tables_put_together_what_a_kernel_reads(bits, wide, kind, data):
    least, most = {"counted": (0, 1), "signed": (-0.5, 0.5), "odd": (-1, 1)}[kind]
    values = range(round(least * 2**bits) + (kind == "odd"), round(most * 2**bits), 2 if kind == "odd" else 1)
    assert len(values) == 2**bits
    numbers = st.lists(st.sampled_from(values), min_size=16, max_size=16)
    dtype = torch.uint8 if kind == "counted" else torch.int8
    codes = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=3)), dtype=dtype)
    planes = split(unsigned(codes, bits, kind == "odd"), bits)
    assert sum(plane.numel() for plane in planes) * 8 == codes.numel() * bits
    joined = torch.zeros(len(codes), 16 * wide // 8, dtype=torch.uint8)
    for plane, table in zip(planes, tables(bits, wide, kind != "counted", kind == "odd"), strict=True):
        more = table[plane.int()].flatten(1)
        assert not (joined & more).any()
        joined |= more
    read = codes.int() if kind == "counted" else codes.int() + 2 ** (wide - 1)  # what a kernel takes off
    assert torch.equal(joined, pack_rows(read.to(torch.uint8), wide))


def test_planes_are_the_powers_of_two_of_a_number():
    assert [plane_bits(bits) for bits in (2, 3, 4, 5, 6, 8)] == [(2,), (2, 1), (4,), (4, 1), (4, 2), (8,)]
