"""Low-rank factors against NumPy's singular value decomposition in float64."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError
from qexport.quant import lowrank
from qexport.quant.lowrank import low_rank, quantize_factor, share_removed
from qexport.quant.observers import ChannelMeanAbs

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 30))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def separated(rows, columns, seed=0):
    """A matrix with singular values that halve from one to the next."""
    count = min(rows, columns)
    left, right = (torch.linalg.qr(gaussian(n, count, seed=seed + n)).Q for n in (rows, columns))
    return left * 0.5 ** torch.arange(count) @ right.t()


def error_left(error, down, up, weights=1.0):
    left = (error.double() - (down.double() @ up.double()).t()) * weights
    return float(left.norm())


def least(error, rank, weights=1.0):
    """What the best matrix of a rank leaves of error * weights."""
    values = numpy.linalg.svd((error.double() * weights).numpy(), compute_uv=False)
    return float(numpy.linalg.norm(values[rank:]))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**32))
def test_no_matrix_of_the_rank_is_closer(sizes, seed):
    rows, columns, rank = sizes
    error = gaussian(rows, columns, seed=seed)
    down, up = low_rank(error, rank)
    assert down.dtype == up.dtype == torch.float32
    assert down.shape == (columns, min(rank, rows, columns)) and up.shape == (down.shape[1], rows)
    assert error_left(error, down, up) == pytest.approx(least(error, rank), rel=1e-5, abs=1e-5 * float(error.norm()))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**32))
def test_with_weights_no_matrix_of_the_rank_is_closer_where_they_are_large(sizes, seed):
    rows, columns, rank = sizes
    error, weights = gaussian(rows, columns, seed=seed), gaussian(columns, seed=seed + 1).exp().double()
    down, up = low_rank(error, rank, weights)
    size = float((error * weights).norm())
    assert error_left(error, down, up, weights) == pytest.approx(least(error, rank, weights), rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_factors_are_singular_vectors_with_the_root_of_the_value_on_either_side(shape):
    error = separated(*shape)
    u, s, v = numpy.linalg.svd(error.double().numpy(), full_matrices=False)
    down, up = low_rank(error, 3)
    for i in range(3):
        sign = 1 if u[abs(u[:, i]).argmax(), i] > 0 else -1
        assert numpy.allclose(up[i], sign * u[:, i] * s[i] ** 0.5, atol=1e-6)
        assert numpy.allclose(down[:, i], sign * v[i] * s[i] ** 0.5, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_weights_give_the_same_as_dividing_the_weighted_decomposition_back(shape):
    error, weights = separated(*shape), torch.linspace(0.5, 2, shape[1])
    u, s, v = numpy.linalg.svd((error * weights).double().numpy(), full_matrices=False)
    down, up = low_rank(error, 2, weights)
    expected = u[:, :2] * s[:2] @ v[:2] / weights.numpy()
    assert numpy.allclose((down @ up).t(), expected, atol=1e-6)


def test_weights_have_no_unit():
    error, weights = gaussian(6, 9), torch.linspace(0.1, 3, 9)
    for ours, theirs in zip(low_rank(error, 2, weights), low_rank(error, 2, 1e6 * weights), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_more_rank_leaves_less_error_and_full_rank_none(seed, weighted):
    error = gaussian(10, 16, seed=seed)
    weights = torch.rand(16, generator=torch.Generator().manual_seed(seed)) if weighted else None
    sizes = [error_left(error, *low_rank(error, rank, weights)) for rank in range(1, 11)]
    assert sizes[0] < float(error.norm())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-6 * float(error.norm())


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_no_error_gives_zero_factors(shape):
    down, up = low_rank(torch.zeros(shape), 3)
    assert not down.any() and not up.any()
    assert share_removed(torch.zeros(shape), down, up) == 0


@pytest.mark.parametrize("weights", [None, torch.arange(14.0)])
@pytest.mark.parametrize("shape", [(9, 14), (20, 14)])
def test_an_error_of_lower_rank_is_taken_away_whole(shape, weights):
    error = gaussian(shape[0], 2) @ gaussian(2, shape[1], seed=1)
    down, up = low_rank(error, 6, weights)
    assert bool(torch.isfinite(down).all() and torch.isfinite(up).all())
    assert share_removed(error, down, up) == pytest.approx(1)


def test_features_never_seen_are_corrected_as_far_as_the_others_lead():
    error, weights = gaussian(6, 9), torch.rand(9)
    weights[4] = 0
    down, up = low_rank(error, 3, weights)
    assert float((error[:, 4] - (down @ up)[4]).norm()) < float(error[:, 4].norm())


def test_weights_that_are_all_zero_count_for_nothing():
    error = gaussian(6, 9)
    for ours, theirs in zip(low_rank(error, 3, torch.zeros(9)), low_rank(error, 3), strict=True):
        assert torch.equal(ours, theirs)


def test_factors_are_the_same_every_time_and_signs_are_fixed():
    error = gaussian(13, 17)
    (down, up), again = low_rank(error, 5), low_rank(error.clone(), 5)
    assert torch.equal(down, again[0]) and torch.equal(up, again[1])
    assert bool((up.gather(1, up.abs().argmax(1, keepdim=True)) > 0).all())
    for ours, theirs in zip(low_rank(-error, 5), (-down, up), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 260), (260, 300)])
def test_large_matrices_are_iterated_to_nearly_the_same(shape, monkeypatch):
    """White noise is the worst case: no singular value stands out."""
    noise = gaussian(*shape)
    exact = share_removed(noise, *low_rank(noise, 1))
    monkeypatch.setattr(lowrank, "_EXACT", 100)
    tops = []
    top = lowrank._top
    monkeypatch.setattr(lowrank, "_top", lambda gram, rank: tops.append(len(gram)) or top(gram, rank))
    down, up = low_rank(noise, 1)
    assert tops == [lowrank._BLOCKS * (1 + lowrank._SPARE)]  # not of the whole matrix
    assert 0.999 * exact < share_removed(noise, down, up) <= exact + 1e-9
    again = low_rank(noise, 1)
    assert torch.equal(down, again[0]) and torch.equal(up, again[1])
    thin = gaussian(shape[0], 1) @ gaussian(1, shape[1], seed=1)
    assert share_removed(thin, *low_rank(thin, 1)) == pytest.approx(1)
    assert not low_rank(torch.zeros(shape), 1)[1].any()


def test_int8_factors_have_one_scale_for_each_column():
    factor = gaussian(11, 4) * torch.tensor([1.0, 10.0, 100.0, 0.0])
    quantized = quantize_factor(factor)
    assert quantized.codes.shape == (4, 11) and quantized.codes.dtype == torch.int8
    scale = factor.abs().amax(0) / 127
    scale[3] = 1
    assert torch.equal(quantized.scale[:, 0], scale)
    assert bool(((quantized.dequantize().t() - factor).abs() <= 0.5001 * scale).all())


def test_share_removed_is_of_the_squared_norm():
    error = torch.diag(torch.tensor([3.0, 4.0]))
    down, up = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 2.0]])
    assert share_removed(error, down, up) == pytest.approx(16 / 25)


def test_what_cannot_be_used_is_refused():
    error = gaussian(4, 5)
    for bad in (-1.0, float("nan"), float("inf")):
        weights = torch.ones(5)
        weights[2] = bad
        with pytest.raises(NumericsError, match="weight of an input feature"):
            low_rank(error, 2, weights)
    error[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="NaN or Inf"):
        low_rank(error, 2)


def test_mean_magnitudes_do_not_depend_on_how_tokens_are_split():
    x = gaussian(40, 6) * torch.logspace(-3, 3, 6)
    for pieces in ((x,), x.split(7), (x[:0], *x.split(1))):
        observer = ChannelMeanAbs()
        for piece in pieces:
            observer.update(piece)
        mean = observer.mean()
        assert mean.dtype == torch.float32
        assert numpy.allclose(mean, numpy.abs(x.double().numpy()).mean(0), rtol=1e-6)


def test_mean_magnitudes_need_real_numbers():
    with pytest.raises(NumericsError, match="no activation"):
        ChannelMeanAbs().mean()
    with pytest.raises(NumericsError, match="NaN or Inf"):
        ChannelMeanAbs().update(torch.tensor([[1.0, float("inf")]]))
