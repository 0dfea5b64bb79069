"""Floats of 4 and 8 bits, their scales, and GPTQ and clipping over them: against ml_dtypes, and slow float64."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError, RecipeError
from qexport.quant.formats import ScaledFormat, Scheme, SteppedFormat, weight_formats
from qexport.quant.gptq import gptq_quantize
from qexport.quant.hessian import HessianStatistic
from qexport.quant.small_floats import (
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    e8m0_codes,
    e8m0_values,
)

NAMES = ("w8a16_fp8", "w8a16_fp8_b128", "mxfp8", "mxfp4", "nvfp4", "ternary_g32")
BYTES = np.arange(256, dtype=np.uint8)
# Every number of bfloat16: all binades of float32, with ties of every format here among them.
BFLOATS = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
FINITE = BFLOATS[np.isfinite(BFLOATS)]
names = pytest.mark.parametrize("name", NAMES)


def fmt(name):
    return Scheme.parse(name).weight


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "ours, theirs, codes",
    [(e2m1_values, ml_dtypes.float4_e2m1fn, 16), (e4m3_values, ml_dtypes.float8_e4m3fn, 256),
     (e8m0_values, ml_dtypes.float8_e8m0fnu, 256)],
)  # fmt: skip
def test_every_code_is_the_number_that_ml_dtypes_has(ours, theirs, codes):
    found = ours(torch.from_numpy(BYTES[:codes])).numpy()
    assert np.array_equal(found, BYTES[:codes].view(theirs).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(
    "codes, values, theirs, largest",
    [(e2m1_codes, e2m1_values, ml_dtypes.float4_e2m1fn, 6), (e4m3_codes, e4m3_values, ml_dtypes.float8_e4m3fn, 448)],
)
def test_rounding_is_to_nearest_ties_to_even_and_saturates(codes, values, theirs, largest):
    """ml_dtypes makes NaN of what is beyond 464; 465 to 480 would have been rounded to a number that is not there."""
    found = values(codes(torch.from_numpy(FINITE))).numpy()
    assert np.array_equal(found, np.clip(FINITE, -largest, largest).astype(theirs).astype(np.float32))


def test_zero_has_no_sign():
    assert e2m1_codes(torch.tensor([-0.0, -0.1, 0.1])).tolist() == [0, 0, 0]


def test_powers_of_two_stay_within_normal_float32():
    exponents = torch.tensor([-200, -127, -126, 0, 127, 200])
    assert e8m0_values(e8m0_codes(exponents)).tolist() == [2.0**e for e in (-126, -126, -126, 0, 127, 127)]


LEVELS = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e4m3": [float(v) for v in BYTES[:127].view(ml_dtypes.float8_e4m3fn).astype(float)],
}


def slow_scales(name, w):
    """By the words of each standard, in float64, one block at a time: {(row, block): scale}."""
    w = w.double().numpy()
    (n, k), found = w.shape, {}
    if name == "nvfp4":
        whole = np.float32(np.abs(w).max()) / np.float32(6 * 448)
        for i, j in itertools.product(range(n), range(k // 16)):
            step = np.float32(np.abs(w[i, 16 * j : 16 * j + 16]).max()) / np.float32(6) / whole
            found[i, j] = float(np.float32(max(step, 2.0**-9)).astype(ml_dtypes.float8_e4m3fn)) * float(whole)
    elif name in ("mxfp4", "mxfp8"):
        for i, j in itertools.product(range(n), range(k // 32)):
            exponent = math.floor(math.log2(np.abs(w[i, 32 * j : 32 * j + 32]).max()))
            found[i, j] = 2.0 ** (exponent - (2 if name == "mxfp4" else 8))
    elif name == "w8a16_fp8":
        found = {(i, 0): np.abs(w[i]).max() / 448 for i in range(n)}
    else:
        for i, j in itertools.product(range(n), range(-(-k // 128))):
            top = i // 128 * 128
            found[i, j] = np.abs(w[top : top + 128, 128 * j : 128 * j + 128]).max() / 448
    return found


@pytest.mark.parametrize("name", NAMES[:-1])
def test_scales_and_codes_are_those_of_the_words(name):
    w = normal(140 if name.endswith("b128") else 5, 288) * torch.logspace(-3, 1, 288)
    found = fmt(name).round_to_nearest(w)
    slow, size = slow_scales(name, w), found.format.group_size or 288
    levels = np.array(LEVELS["e2m1" if name.endswith("fp4") else "e4m3"])
    levels = np.concatenate([-levels, levels])
    for i in range(0, len(w), 7):
        for j in range(0, 288, 5):
            step = slow[i, j // size]
            assert abs(float(found.scale[i, j // size]) - step) <= 2**-22 * step
            steps = float(w[i, j]) / step
            nearest = np.abs(levels - steps).min()
            off = abs(float(found.dequantize()[i, j]) / step - steps)
            assert off <= nearest + 1e-5 * max(abs(steps), 2**-10)


@names
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-25, 1e25), st.sampled_from([32, 128, 160]))
def test_what_is_rounded_stays_as_it_is(name, seed, size, columns):
    """What codes stand for is rounded to itself, by the same scales; zero stays zero."""
    w = normal(3, columns, seed=seed) * size
    w[0, :32] = 0
    found = fmt(name).round_to_nearest(w)
    values = found.dequantize()
    assert torch.isfinite(values).all() and (found.scale > 0).all() and (values[0, :32] == 0).all()
    again = found.format.encode(values, found.scale, None)
    assert torch.equal(found.format.decode(again, found.scale, None), values)
    assert torch.equal(fmt(name).round_to_nearest(-w).dequantize(), -values)


@names
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_a_search_for_clipping_never_makes_the_error_larger(name, seed, weighted):
    w = normal(4, 128, seed=seed) ** 3
    importance = normal(128, seed=seed + 1).abs() if weighted else None
    found = fmt(name).for_weight(w)
    plain, _ = found.scales(w)
    clipped, _ = found.clipped_scales(w, importance)
    before, after = (found.errors(w, scale, importance) for scale in (plain, clipped))
    assert (after <= before).all() and after.sum() < before.sum() or torch.equal(plain, clipped)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_stored_scales_are_read_back(name):
    q = fmt(name).round_to_nearest(normal(200, 160) * 0.02, clip_search=True)
    stored, whole = q.format.stored_scale(q.scale), getattr(q.format, "tensor_scale", None)
    assert torch.equal(q.format.read_scale(stored, None if whole is None else torch.tensor(whole), 200), q.scale)
    counted = stored.numel() * stored.element_size() + (4 if whole else 0)
    assert q.format.bytes((200, 160), 2) == 200 * 160 * q.format.bits // 8 + counted


def correlated(n=6, k=64):
    x = normal(300, k, seed=1) @ (normal(k, k, seed=2) * torch.logspace(0, -1.5, k)[:, None])
    return normal(n, k), (2 / 300) * x.t() @ x


def objective(w, q, hessian):
    error = (w - q.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def nearest(fmt, steps):
    return fmt.values(fmt.nearest(steps)) if isinstance(fmt, ScaledFormat) else steps.round().clamp(fmt.qmin, fmt.qmax)


@pytest.mark.parametrize("name", [*NAMES, "nf4_g32", "fp4_g32", "nf4_g32_dq"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_elimination_over_the_values_of_the_format(name, act_order):
    """Optimal brain quantization in float64: one feature at a time out of the inverse, no factor and no blocks."""
    w, hessian = correlated()
    got = gptq_quantize(w, hessian, fmt(name), act_order=act_order)
    q, scale = got.format, got.scale.double()
    left, h, k = w.double().clone(), hessian.double(), w.shape[1]
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(k))
    order = sorted(range(k), key=lambda j: -float(h[j, j])) if act_order else range(k)
    values = torch.zeros_like(left)
    size = q.group_size or k
    for j in order:
        step = scale[:, j // size]
        values[:, j] = nearest(q, (left[:, j] / step).float()).double() * step
        error = (left[:, j] - values[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[:, j] = inverse[j] = 0
        inverse[j, j] = 1
    same = (got.dequantize().double() - values).abs() < 1e-5 * values.abs().max()
    assert same.float().mean() > 0.97  # float32 and float64 fall on two sides of a tie now and then
    slow, ours, plain = (
        float((((w.double() - v) @ h) * (w.double() - v)).sum())
        for v in (values, got.dequantize().double(), fmt(name).round_to_nearest(w).dequantize().double())
    )
    assert ours < 1.05 * slow and ours < 0.8 * plain


@names
def test_gptq_with_a_search_for_clipping(name):
    w, hessian = correlated(8, 128)
    plain, clipped = (gptq_quantize(w, hessian, fmt(name), clip_search=search) for search in (False, True))
    assert torch.equal(clipped.scale, clipped.format.clipped_scales(w, hessian.diagonal())[0])
    assert objective(w, clipped, hessian) < 1.3 * objective(w, plain, hessian)


def test_far_smaller_groups_take_a_scale_that_cudas_kernel_can_hold():
    w = normal(2, 64)
    w[0, :32] *= 2.0**-40
    w[1, :32] = 0
    exponents = fmt("mxfp4").round_to_nearest(w, clip_search=True).scale.log2()
    assert exponents.max() - exponents.min() <= 17
    assert (fmt("mxfp4").round_to_nearest(torch.zeros(2, 32)).dequantize() == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@names
def test_weights_that_are_not_finite(name, bad):
    w = normal(2, 128)
    w[1, 5] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        fmt(name).round_to_nearest(w)


def test_widths():
    for name, columns, fits in [
        ("mxfp4", 96, True), ("mxfp4", 80, False), ("nvfp4", 80, True), ("nvfp4", 72, False), ("mxfp8", 48, False),
        ("w8a16_fp8", 7, True), ("w8a16_fp8_b128", 200, True),
    ]:  # fmt: skip
        scheme, why = Scheme.parse(name).fit(columns)
        assert (scheme is not None) == fits, name
        assert fits or f"{columns} input features do not divide" in why


def test_names():
    for name in ("mxfp4_g16", "nvfp4_dq", "w8a4_fp8", "w4a16_fp8", "mxfp6", "ternary_g48"):
        with pytest.raises(RecipeError):
            Scheme.parse(name)
    assert all(issubclass(kind, SteppedFormat) for kind in weight_formats())
    assert Scheme.parse("W8A16_FP8").weight.name == "w8a16_fp8"


def test_ternary_scales_are_the_papers():
    w = normal(3, 64) ** 3
    q = fmt("ternary_g32").round_to_nearest(w)
    assert set(q.codes.unique().tolist()) == {-1, 0, 1}
    for i, j in itertools.product(range(3), range(2)):
        size = w[i, 32 * j : 32 * j + 32].abs().double()
        assert float(q.scale[i, j]) == pytest.approx(float(size[size > 0.7 * size.mean()].mean()), rel=1e-6)


def test_a_hessian_of_real_inputs():
    """As a pass does it: a statistic of rows, and the weight of a linear that reads them."""
    seen = HessianStatistic("token_norm", 0.75)
    seen.update(normal(256, 64) * torch.logspace(-1, 1, 64))
    w, hessian = normal(8, 64, seed=3), seen.value()
    for name in NAMES:
        assert objective(w, gptq_quantize(w, hessian, fmt(name)), hessian) < objective(
            w, fmt(name).round_to_nearest(w), hessian
        )
