"""HQQ: its update against a float64 reference, and what it promises of every group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError, RecipeError
from qexport.quant.affine import encode, search_clip, weight_scales
from qexport.quant.formats import PER_CHANNEL, PER_TENSOR, IntegerFormat, QuantizedWeight
from qexport.quant.hqq import hqq_quantize

SIZES = (16, PER_CHANNEL, PER_TENSOR)
FORMATS = [IntegerFormat(bits, size, sym) for bits in (2, 3, 4, 8) for size in SIZES for sym in (True, False)]


def heavy(n=6, k=64, seed=0):
    """A weight with tails as those of a Student distribution of three degrees."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(3, n, k, generator=generator).square().mean(0)
    return torch.randn(n, k, generator=generator) / chi.sqrt()


def grouped(w, fmt):
    return w.reshape(1, 1, -1) if fmt.group_size == PER_TENSOR else w.reshape(w.shape[0], fmt.groups(w.shape[1]), -1)


def objective(w, q, p=0.7):
    return grouped((w.double() - q.dequantize().double()).abs().pow(p), q.format).sum(-1)


def clipped(w, fmt):
    scale, zero_point = search_clip(w, fmt)
    return QuantizedWeight(encode(w, scale, zero_point, fmt), scale, zero_point, fmt)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32), st.floats(0.3, 1), st.floats(0.1, 20), st.floats(1, 1.1))
def test_no_group_is_worse_than_rounding_and_the_grid_is_one(fmt, seed, p, beta, kappa):
    w = heavy(seed=seed)
    q = hqq_quantize(w, fmt, p=p, beta=beta, kappa=kappa, iterations=5)
    plain = fmt.round_to_nearest(w)
    # A code that hits its weight leaves the rounding of float32, of which a small power is not small.
    ulp = (2.0**-23 * w.abs().max().double()) ** p
    assert (objective(w, q, p) <= objective(w, plain, p) * (1 + 1e-5) + ulp).all()
    assert q.scale.dtype == torch.float32 and q.scale.shape == plain.scale.shape and (q.scale > 0).all()
    assert torch.equal(q.codes, encode(w, q.scale, q.zero_point, fmt)) and q.codes.dtype == plain.codes.dtype
    assert q.codes.amin() >= fmt.qmin and q.codes.amax() <= fmt.qmax
    assert (q.zero_point is None) == fmt.symmetric
    if q.zero_point is not None:
        assert q.zero_point.dtype == torch.uint8 and q.zero_point.amax() <= fmt.qmax


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32))
def test_more_iterations_never_raise_the_objective(fmt, seed):
    w = heavy(seed=seed)
    values = [objective(w, hqq_quantize(w, fmt, iterations=n)) for n in (0, 1, 2, 5, 20)]
    for fewer, more in zip(values, values[1:], strict=False):
        assert (more <= fewer * (1 + 1e-5)).all()


def slow_hqq(values, scale, zero, fmt, first, p, beta, kappa, iterations):
    """One group in float64 with the auxiliary error written out: the best scale and its objective."""
    unit, candidates = first[0], [first]
    for i in range(iterations + 1):
        candidates.append((scale, zero))
        along = square = 0.0
        for x in values:
            code = min(max(round(x / scale), fmt.qmin - zero), fmt.qmax - zero)
            r = (x - code * scale) / unit
            e = math.copysign(max(abs(r) - abs(r) ** (p - 1) / (beta * kappa**i), 0.0), r) if r else 0.0
            along, square = along + (x - e * unit) * code, square + code * code
        scale = along / square if square else scale

    def value(step, offset):
        codes = [min(max(round(x / step), fmt.qmin - offset), fmt.qmax - offset) for x in values]
        return sum(abs((x - c * step) / unit) ** p for x, c in zip(values, codes, strict=True))

    return min((value(*candidate), candidate[0]) for candidate in candidates)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_are_those_of_the_alternation_written_out(fmt):
    w = heavy(4, 32)
    q, unit = hqq_quantize(w, fmt, beta=2.0, kappa=1.05, iterations=4), weight_scales(w, fmt)[0]
    (plain, plain_zero), (start, start_zero) = weight_scales(w, fmt), search_clip(w, fmt)
    zero = lambda z, at: 0 if z is None else int(z[at])  # noqa: E731
    got = objective(w, q)
    for i, row in enumerate(grouped(w, fmt)):
        for g, values in enumerate(row):
            at = (i, g)
            want, scale = slow_hqq(
                values.tolist(), float(start[at]), zero(start_zero, at), fmt,
                (float(plain[at]), zero(plain_zero, at)), 0.7, 2.0, 1.05, 4,
            )  # fmt: skip
            assert float(got[at]) / float(unit[at]) ** 0.7 == pytest.approx(want, rel=1e-4)
            assert float(q.scale[at]) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_sparser_than_by_rounding_or_by_the_best_clipping(symmetric):
    w, fmt = heavy(32, 256), IntegerFormat(3, 64, symmetric)
    value = float(objective(w, hqq_quantize(w, fmt)).sum())
    assert value < 0.95 * float(objective(w, fmt.round_to_nearest(w)).sum())
    assert value < float(objective(w, clipped(w, fmt)).sum())
    squared = float(objective(w, hqq_quantize(w, fmt), 2).sum())
    assert squared < 0.9 * float(objective(w, fmt.round_to_nearest(w), 2).sum())


def test_it_does_not_depend_on_the_unit_of_the_weight():
    w, fmt = heavy(), IntegerFormat(4, 16)
    q, small = hqq_quantize(w, fmt), hqq_quantize(w * 2.0**-20, fmt)
    assert torch.equal(q.codes, small.codes) and torch.equal(q.scale * 2.0**-20, small.scale)


@pytest.mark.parametrize("fmt", [IntegerFormat(4, 16), IntegerFormat(2, 16, False), IntegerFormat(4, PER_TENSOR)])
def test_zeros_and_groups_that_the_grid_holds_exactly(fmt):
    w = torch.zeros(3, 32)
    assert torch.equal(hqq_quantize(w, fmt).dequantize(), w)
    exact = (torch.arange(32) % 4).float().repeat(3, 1)
    exact[:, ::16] = fmt.qmax  # a full range: rounding makes no error
    assert torch.equal(hqq_quantize(exact, fmt).dequantize(), exact)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_worked_on_in_pieces(size, monkeypatch):
    w, fmt = heavy(10, 64), IntegerFormat(4, size)
    whole = hqq_quantize(w, fmt)
    for room in ("affine", "hqq"):
        monkeypatch.setattr(f"qexport.quant.{room}.CHUNK", 3 * 64)
    pieces = hqq_quantize(w, fmt)
    assert torch.allclose(whole.scale, pieces.scale, rtol=1e-5)
    assert (whole.codes != pieces.codes).sum() <= 1


def test_half_precision_is_taken_as_float32():
    w, fmt = heavy().half(), IntegerFormat(4, 16)
    half, full = hqq_quantize(w, fmt), hqq_quantize(w.float(), fmt)
    assert (objective(w, half) <= objective(w, fmt.round_to_nearest(w)) * (1 + 1e-3)).all()
    assert torch.allclose(half.scale, full.scale, rtol=1e-2)


def test_what_cannot_be_used_is_refused():
    w, fmt = heavy(), IntegerFormat(4, 16)
    for options in ({"p": 0}, {"p": 1.5}, {"beta": 0}, {"kappa": 0.9}, {"p": math.nan}):
        with pytest.raises(RecipeError, match="HQQ"):
            hqq_quantize(w, fmt, **options)
    w[2, 3] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        hqq_quantize(w, fmt)
