"""Plans of codebooks, 2-bit and 3-bit weights and long groups: the scheme that fits, and its bytes."""

import pytest

from qexport.plan.linear_plan import LinearPlan, fit, weight_bytes
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
        ("w3a16_g32_asym", 64 * 1024 // 2 + 4 * 64 * 32 + 64 * 16),  # in 4 bits
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
