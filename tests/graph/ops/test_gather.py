"""Rows looked up in a quantized table are the rows of the dequantized one."""

import pytest
import torch

from qexport.graph import ops as _ops  # noqa: F401  registers the operators
from qexport.quant.formats import IntegerFormat

ops = torch.ops.qexport
FORMATS = [
    IntegerFormat(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (16, 64) for symmetric in (True, False)
]


def table(fmt, rows=24, features=64):
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(fmt.bits))
    return fmt.round_to_nearest(weight)


def look_up(quantized, ids, dtype=torch.float32):
    fmt = quantized.format
    zero_point = None if quantized.zero_point is None else quantized.zero_point.t().contiguous()
    return ops.gather_quantized(
        quantized.codes.t().contiguous(), quantized.scale.t().contiguous().to(dtype), zero_point, ids,
        fmt.group_size, fmt.stored_bits,
    )  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (2, 0)])
def test_rows_are_those_of_the_dequantized_table(fmt, shape):
    quantized = table(fmt)
    ids = torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(1))
    rows = look_up(quantized, ids)
    assert rows.shape == (*shape, 64) and rows.is_contiguous()
    assert torch.equal(rows, quantized.dequantize()[ids])


def test_float16_scales_make_float16_rows():
    quantized, ids = table(IntegerFormat(4, 32)), torch.tensor([[3, 0, 23]])
    rows = look_up(quantized, ids, torch.float16)
    scale = quantized.scale.half().float().repeat_interleave(32, dim=1)
    assert torch.equal(rows, (quantized.codes.float() * scale)[ids].half())


def test_what_tracing_sees_is_what_comes_out():
    quantized, ids = table(IntegerFormat(4, 32, False)), torch.tensor([[3, 0, 23]])
    arguments = (quantized.codes.t().contiguous(), quantized.scale.t().contiguous())
    arguments += (quantized.zero_point.t().contiguous(), ids, 32, 4)
    torch.library.opcheck(ops.gather_quantized.default, arguments, test_utils=("test_schema", "test_faketensor"))
