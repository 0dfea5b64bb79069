"""Plans of codebooks, 2-bit and 3-bit weights and long groups: the scheme that fits, and its bytes."""

import pytest
import torch

from qexport.capture.module import capture_module
from qexport.plan.linear_plan import LinearPlan, fit, make_plan, weight_bytes
from qexport.quant.formats import Scheme


@pytest.mark.parametrize(
    "scheme, width, found",
    [
        ("w4a16_g1024", 1536, "w4a16_g512"),
        ("w4a16_g1024", 768, "w4a16_g256"),
        ("w2a16_g512_asym", 1024 + 128, "w2a16_g128_asym"),
        ("w4a8_g512_int", 576, "w4a8_g64_int"),
        ("w4a8_g512_static_int", 1536, "w4a8_g512_static_int"),
        ("nf4", 96, "nf4_g32"),
        ("nf4", 576, "nf4"),
        ("nf4_g128", 576, "nf4_g64"),
        ("nf4_dq", 48, "nf4_g16_dq"),
        ("fp4_g1024_dq", 1536, "fp4_g512_dq"),
        ("fp4", 100, None),
    ],
)
def test_the_scheme_that_fits_is_the_one_of_its_name(scheme, width, found):
    fitted, reason = fit(Scheme.parse(scheme), width)
    assert (fitted and fitted.name) == found
    assert fitted is None or fitted == Scheme.parse(found)
    assert (reason == "") == (found == scheme)


@pytest.mark.parametrize(
    "scheme, size",
    [
        ("w2a16_g64", 64 * 1024 // 4 + 4 * 64 * 16),
        ("w2a16_g64_asym", 64 * 1024 // 4 + 4 * 64 * 16 + 64 * 4),
        ("w2a16_g512_asym", 64 * 1024 // 4 + 4 * 64 * 8 + 64 * 2),  # blocks of 128
        ("w3a16_g32_asym", 64 * 1024 * 3 // 8 + 4 * 64 * 32 + 64 * 16),  # zero points in 4 bits
        ("w5a16_g512_s8", 64 * 1024 * 5 // 8 + 64 * (4 + 1)),  # blocks of 256
        ("w4a16_g1024", 64 * 1024 // 2 + 4 * 64 * 4),  # blocks of 256
        ("w4a8_g1024_int", 64 * 1024 // 2 + 4 * 64 + 4 * 64),
        ("nf4", 64 * 1024 // 2 + 4 * 64 * 16),
        ("fp4_g1024_dq", 64 * 1024 // 2 + 4 * 64 * 4),
    ],
)
def test_bytes_are_those_of_the_containers_in_the_file(scheme, size):
    plan = LinearPlan("name", "block", (64, 1024), Scheme.parse(scheme))
    assert weight_bytes(plan) == size


def test_scales_of_integer_products_stay_float32():
    for scheme, kept in (("w8a8_dyn", True), ("w4a8_g64_int", True), ("w4a16_g64", False), ("nf4", False)):
        plan = LinearPlan("name", "block", (64, 1024), Scheme.parse(scheme))
        assert (weight_bytes(plan, 2) == weight_bytes(plan, 4)) == kept


@pytest.mark.parametrize(
    "scheme, width, found",
    [
        ("w4a16_g128", 576, "w4a16_g64"),  # 9 whole groups, not 5 of which half of one is padding
        ("w4a16_g128", 1536, "w4a16_g128"),
        ("w4a16_g128", 1000, "w4a16_g128"),  # no group of 16 and more fills it
        ("w4a16_g128", 144, "w4a16_g16"),
        ("w4a16_g128", 1008, "w4a16_g128"),  # 63 groups of 16 take more than 8 of 128
        ("w8a8_dyn", 576, "w8a8_dyn"),
    ],
)
def test_whole_groups_are_taken_where_they_are_smaller(scheme, width, found):
    captured = capture_module(torch.nn.Linear(width, 8), (torch.zeros(2, width),))
    graphs = [(block.name, block.module.graph) for block in captured.blocks]
    asked, better = (
        make_plan(graphs, lambda name: Scheme.parse(scheme), whole_groups=whole)[0] for whole in (False, True)
    )
    assert better.chosen.name == found and asked.chosen.name == scheme
    assert (weight_bytes(better) < weight_bytes(asked)) == (found != scheme) == ("fewer bytes" in better.reason)
