"""Integer grids against per-element float64 references, and the properties a grid must have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError
from qexport.quant import affine
from qexport.quant.affine import encode, search_clip, static_scale, weight_scales
from qexport.quant.formats import PER_CHANNEL, PER_TENSOR, ActivationFormat, IntegerFormat, QuantizedWeight
from qexport.quant.gptq import gptq_quantize
from qexport.quant.hqq import hqq_quantize
from qexport.quant.straight_through import round_weight

SIZES = (16, PER_CHANNEL, PER_TENSOR)
FORMATS = [IntegerFormat(bits, size, sym) for bits in (4, 8) for size in SIZES for sym in (1, 0)]
DYNAMIC = ActivationFormat("dynamic")
some = settings(max_examples=25, deadline=None)


def weight(n=5, k=64, seed=0, **options):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), **options)


def nearest(w, fmt):
    return fmt.round_to_nearest(w)


def groups_of(w, fmt):
    """The groups of a weight as (index into the scales, list of (row, column))."""
    n, k = w.shape
    if fmt.group_size == PER_TENSOR:
        return [((0, 0), [(i, j) for i in range(n) for j in range(k)])]
    size = fmt.group_size or k
    return [((i, g), [(i, g * size + j) for j in range(size)]) for i in range(n) for g in range(k // size)]


def slow_scale(values, fmt, clip=1.0):
    lo, hi = min(values) * clip, max(values) * clip
    if fmt.symmetric:
        return max(-lo, hi) / (2 ** (fmt.bits - 1) - 1), 0
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (2**fmt.bits - 1)
    return scale, round(-lo / scale)


def slow_error(values, scale, zero, fmt, importance):
    low, high = (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1) if fmt.symmetric else (0, 2**fmt.bits - 1)
    total = 0.0
    for value, weight_of in zip(values, importance, strict=True):
        code = min(max(round(value / scale) + zero, low), high)
        total += weight_of * (value - (code - zero) * scale) ** 2
    return total


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_round_to_nearest_agrees_with_a_loop(fmt):
    w = weight()
    q = fmt.round_to_nearest(w)
    value = q.dequantize()
    assert q.shape == (5, 64) and q.codes.dtype == (torch.int8 if fmt.symmetric else torch.uint8)
    assert q.scale.dtype == value.dtype == torch.float32 and (q.zero_point is None) == bool(fmt.symmetric)
    for at, members in groups_of(w, fmt):
        scale, zero = slow_scale([float(w[m]) for m in members], fmt)
        assert float(q.scale[at]) == pytest.approx(scale, rel=2**-22)  # two float32 roundings
        assert fmt.symmetric or int(q.zero_point[at]) == zero
        step = float(q.scale[at])
        for m in members:
            x = float(w[m]) / step
            code = min(max(round(x) + zero, fmt.qmin), fmt.qmax)
            # A float32 division may cross a tie that float64 sees 1e-5 away; nothing else may differ.
            assert int(q.codes[m]) == code or abs(x - math.floor(x) - 0.5) < 1e-5
            assert float(value[m]) == pytest.approx((int(q.codes[m]) - zero) * step, rel=2**-23)


def test_ties_go_to_even():
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0, -3.5]])
    assert IntegerFormat(4).round_to_nearest(w).codes.tolist() == [[0, 2, 2, 0, -2, -2, 7, -4]]


def test_full_range_leaves_the_lowest_symmetric_code_to_clipping():
    w = torch.tensor([[-7.0, 7.0, -8.0, 9.0]])
    assert encode(w, torch.tensor([[1.0]]), None, IntegerFormat(4)).tolist() == [[-7, 7, -8, 7]]
    assert int(IntegerFormat(4, 16).round_to_nearest(weight(64)).codes.min()) == -7


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("fill", [0.0, 1e-44])
def test_a_group_without_a_representable_scale_becomes_zero(fmt, fill):
    q = fmt.round_to_nearest(torch.full((2, 32), fill))
    assert bool((q.scale == 1).all()) and not q.dequantize().any()


def test_asymmetric_grids_hold_zero_even_when_all_weights_are_positive():
    w = weight().abs() + 1
    for value, zero_point in ((w, 0), (-w, 15)):
        q = IntegerFormat(4, 16, False).round_to_nearest(value)
        error = (value - q.dequantize()).abs().view(5, 4, 16).amax(-1)
        assert bool((q.zero_point == zero_point).all()) and bool((error <= 0.50001 * q.scale).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(fmt, bad):
    w = weight()
    w[3, 17] = bad
    for attempt in (weight_scales, nearest, search_clip):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            attempt(w, fmt)


@pytest.mark.parametrize("fmt", [IntegerFormat(bits, 16, sym) for bits in (4, 8) for sym in (1, 0)], ids=str)
@pytest.mark.parametrize("method", [nearest, hqq_quantize, lambda w, fmt: gptq_quantize(w, torch.eye(w.shape[1]), fmt)])
def test_a_shorter_last_group_has_a_scale_of_its_own(fmt, method):
    w = weight(k=40)
    q = method(w, fmt)
    head, tail = method(w[:, :32], fmt), method(w[:, 32:], IntegerFormat(fmt.bits, 8, fmt.symmetric))
    assert q.scale.shape == (len(w), 3)
    assert torch.equal(q.codes, torch.cat([head.codes, tail.codes], 1))
    assert torch.allclose(q.dequantize(), torch.cat([head.dequantize(), tail.dequantize()], 1))
    assert torch.equal(round_weight(w, fmt), fmt.round_to_nearest(w).dequantize())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_pieces_layout_and_dtype_do_not_matter(fmt, monkeypatch):
    w = weight(7, 32).bfloat16()
    whole, clipped = fmt.round_to_nearest(w.float()), search_clip(w.float(), fmt)
    monkeypatch.setattr(affine, "CHUNK", 64)
    for same in (w, w.float().t().contiguous().t()):
        q = fmt.round_to_nearest(same)
        assert torch.equal(q.codes, whole.codes) and torch.equal(q.scale, whole.scale)
        assert torch.equal(q.dequantize(), whole.dequantize())
        assert torch.equal(search_clip(same, fmt)[0], clipped[0])


@some
@given(st.sampled_from(FORMATS), st.integers(0, 2**32), st.floats(-30, 30))
def test_error_is_half_a_step_and_encoding_again_changes_nothing(fmt, seed, magnitude):
    w = weight(seed=seed) * 10**magnitude
    q = fmt.round_to_nearest(w)
    step = q.scale.repeat_interleave(64 // q.scale.shape[1], 1)
    # One part in 1e5 for float32 rounding of up to 255 steps.
    assert bool(((w - q.dequantize()).abs() <= 0.50001 * step).all())
    assert torch.equal(encode(q.dequantize(), q.scale, q.zero_point, fmt), q.codes)


@some
@given(st.integers(0, 2**32), st.booleans())
def test_smaller_groups_have_finer_scales_and_less_error(seed, symmetric):
    w = weight(8, 256, seed)
    before = None
    for size in (16, 32, 64, 128, PER_CHANNEL):
        q = IntegerFormat(4, size, symmetric).round_to_nearest(w)
        scale, error = q.scale, float((w - q.dequantize()).square().sum())
        if before is not None:
            assert bool((before[0] <= scale.repeat_interleave(before[0].shape[1] // scale.shape[1], 1)).all())
            assert before[1] < error
        before = scale, error


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_search_agrees_with_a_loop(fmt, weighted):
    w = weight(4, 32, seed=3)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    scale, zero_point = search_clip(w, fmt, importance, steps=10)
    for at, members in groups_of(w, fmt):
        values = [float(w[m]) for m in members]
        of = [float(importance[j]) if weighted else 1.0 for _, j in members]
        errors = [slow_error(values, *slow_scale(values, fmt, 1 - i / 20), fmt, of) for i in range(11)]
        zero = 0 if fmt.symmetric else int(zero_point[at])
        # float32 sums may prefer one of two candidates that are equal to seven digits.
        assert slow_error(values, float(scale[at]), zero, fmt, of) == pytest.approx(min(errors), rel=1e-4)


@some
@given(st.sampled_from(FORMATS), st.integers(0, 2**32))
def test_clip_search_never_loses_to_the_full_range(fmt, seed):
    w = weight(4, 32, seed) ** 3
    importance = weight(1, 32, seed + 1)[0].abs()
    scale, zero_point = search_clip(w, fmt, importance)
    clipped = QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)
    clipped_error, error = (
        float((importance * (w - q.dequantize()).double().square()).sum()) for q in (clipped, fmt.round_to_nearest(w))
    )
    assert clipped_error <= error * (1 + 1e-5)  # float32 sums inside the search


def test_clip_search_uses_the_lowest_code():
    w = torch.arange(-8.0, 8.0).view(1, 16) / 8
    scale, _ = search_clip(w, IntegerFormat(4, 16))
    assert float(scale) == 0.125 and encode(w, scale, None, IntegerFormat(4, 16)).tolist() == [list(range(-8, 8))]


def test_importance_decides_between_outlier_and_bulk():
    w = torch.full((1, 16), 0.3)
    w[0, 0] = 7.0
    outlier, bulk = torch.zeros(16), torch.ones(16)
    outlier[0], bulk[0] = 1, 0
    assert float(search_clip(w, IntegerFormat(4, 16), outlier)[0]) == 1
    assert float(search_clip(w, IntegerFormat(4, 16), bulk)[0]) < 0.6


def test_clip_search_keeps_the_full_range_when_nothing_speaks_against_it():
    for fmt in (IntegerFormat(4, 16), IntegerFormat(4, 16, False), IntegerFormat(4, PER_TENSOR)):
        assert torch.equal(search_clip(weight(), fmt, torch.zeros(64))[0], weight_scales(weight(), fmt)[0])


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_impossible_importance_is_refused(bad):
    importance = torch.ones(64)
    importance[5] = bad
    with pytest.raises(NumericsError, match="importance"):
        search_clip(weight(), IntegerFormat(4, 16), importance)


def test_static_scale():
    fmt = ActivationFormat("static")
    assert static_scale(254.0, fmt) == 2 and static_scale(0.0, fmt) == static_scale(1e-44, fmt) == 1
    assert static_scale(0.1, fmt) == float(torch.tensor(0.1) / 127)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(NumericsError, match="range"):
            static_scale(bad, fmt)
