"""Floats that become narrower: what fits is rounded, what is meant to saturate does, all else is refused by name."""

import math

import pytest
import torch

from qexport.errors import NumericsError
from qexport.quant.narrowing import narrowed, narrowed_number

HALF, BRAIN = torch.float16, torch.bfloat16
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_what_fits_is_rounded_as_torch_rounds(dtype):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0] = float("-inf")
    assert torch.equal(narrowed(x, dtype, "x"), x.to(dtype))


@pytest.mark.parametrize("value", [7e4, -7e4, 65520.0])
def test_a_weight_beyond_float16_is_refused_by_name_and_bfloat16_advised(value):
    x = torch.ones(4, 4)
    x[1, 2] = value
    with pytest.raises(NumericsError, match=r"model.norm.weight: does not fit float16: it holds .*bfloat16"):
        narrowed(x, HALF, "model.norm.weight")
    assert narrowed(x, BRAIN, "model.norm.weight")[1, 2] == torch.tensor(value).to(BRAIN)


@pytest.mark.parametrize("value", [LOWEST, torch.finfo(BRAIN).min, -1e9])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_masks_saturate(value, dtype):
    mask = torch.tensor([[0.0, value], [0.0, 0.0]])
    found = narrowed(mask, dtype, "mask")
    assert torch.isfinite(found).all() and found[0, 1] == max(torch.tensor(value).to(dtype), torch.finfo(dtype).min)


def test_one_large_weight_among_others_is_no_mask():
    with pytest.raises(NumericsError, match="does not fit"):
        narrowed(torch.tensor([0.5, -1e9]), HALF, "x")


def test_scales_that_would_vanish_are_refused():
    scales = torch.full((8, 4), 1e-3)
    scales[3, 1] = 5.1e-7  # a subnormal of three bits
    with pytest.raises(NumericsError, match=r"holds scales down to 5.1e-07"):
        narrowed(scales, HALF, "x.weight_scale", scale=True)
    scales[3, 1] = 1e-8
    assert narrowed(scales, HALF, "x.weight_scale", scale=True)[3, 1] == 0  # beside 1e-3 its weights are nothing
    with pytest.raises(NumericsError, match=r"down to 1e-08, and 32 of them become zero"):
        narrowed(torch.full((8, 4), 1e-8), HALF, "x.weight_scale", scale=True)
    assert not narrowed(torch.zeros(8), HALF, "x.weight_scale", scale=True).any()


def test_a_tensor_that_is_lost_as_a_whole_is_refused_and_small_elements_are_not():
    with pytest.raises(NumericsError, match="holds nothing above 1e-08"):
        narrowed(torch.full((8,), 1e-8), HALF, "x")
    assert narrowed(torch.tensor([1.0, 1e-9]), HALF, "x").tolist() == [1, 0]


def test_numbers_of_the_code_saturate_where_they_fill_and_are_refused_where_they_count():
    assert narrowed_number(LOWEST, HALF, "block") == torch.finfo(HALF).min
    assert narrowed_number(-1e9, HALF, "block") == torch.finfo(HALF).min
    assert narrowed_number(float("-inf"), HALF, "block") == float("-inf")
    assert narrowed_number(1e6, torch.float32, "block", counts=True) == 1e6
    with pytest.raises(NumericsError, match=r"block: does not fit float16: it computes with 1e\+06"):
        narrowed_number(1e6, HALF, "block", counts=True)


def test_other_types_and_tensors_without_data_pass():
    codes = torch.arange(5, dtype=torch.int32)
    assert torch.equal(narrowed(codes, torch.int8, "codes"), codes.to(torch.int8))
    assert narrowed(torch.ones(2, device="meta"), HALF, "x").dtype == HALF
    assert narrowed(torch.ones(0, 3), HALF, "x").shape == (0, 3)


def test_nan_stays_nan():
    assert math.isnan(narrowed_number(float("nan"), HALF, "block"))
