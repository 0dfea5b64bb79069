"""Streaming ranges against the same statistic taken over all the data at once."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericsError, RecipeError
from qexport.quant.formats import ActivationFormat
from qexport.quant.observers import (
    AbsmaxObserver,
    ChannelAbsmax,
    ChannelMeanAbs,
    CompositeObserver,
    MseObserver,
    PercentileObserver,
    RowSample,
)

STATIC = ActivationFormat("static")
KINDS = [AbsmaxObserver, PercentileObserver, lambda: MseObserver(STATIC), ChannelAbsmax]


def activations(seed=0, tokens=40, features=50):
    """Features of very different size, one of them with outliers hundreds of times the bulk."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) * torch.logspace(-3, 0.5, features)
    x[:, 7] *= 300
    return x


def observe(observer, *batches):
    for batch in batches:
        observer.update(batch)
    return observer.absmax()


def mean_error(x, clip):
    values, step = x.double().numpy(), clip / 127
    codes = numpy.clip(numpy.rint(values / step), -127, 127)
    return float(numpy.square(values - codes * step).mean())


@pytest.mark.parametrize("make", KINDS)
def test_the_split_of_the_data_does_not_matter(make):
    x = activations()
    whole = torch.as_tensor(observe(make(), x))
    for pieces in (x.split(1), x.flip(0).split(7), (x[:0], x, x[:0])):
        assert torch.equal(torch.as_tensor(observe(make(), *pieces)), whole)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_absmax(seed):
    x = activations(seed)
    assert observe(AbsmaxObserver(), x.view(2, 20, 50)) == max(abs(v) for v in x.flatten().tolist())
    channels = observe(ChannelAbsmax(), x)
    assert channels.dtype == torch.float32
    assert channels.tolist() == [max(abs(v) for v in column) for column in x.t().tolist()]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 50, 99, 99.9, 99.99, 100]))
def test_percentile_is_the_order_statistic(seed, percentile):
    x = activations(seed)
    ranked = sorted(abs(v) for v in x.flatten().tolist())
    exact = ranked[math.ceil(percentile / 100 * len(ranked)) - 1]
    value = observe(PercentileObserver(percentile), *x.split(11))
    assert exact <= value <= exact * (1 + 2**-10) and value <= ranked[-1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_mse_clips_as_well_as_an_exhaustive_search_on_the_data(seed):
    x = activations(seed, tokens=400)
    clip = observe(MseObserver(STATIC), *x.split(100))
    best = min(mean_error(x, float(x.abs().max()) * 2 ** (-i / 32)) for i in range(257))
    # A bin is at most an eighth of a step wide: near-ties between candidates may fall the other way.
    assert mean_error(x, clip) <= 1.001 * best


def test_mse_clips_a_lone_outlier_and_keeps_a_uniform_range():
    # Clipping the outlier to c costs (8 - c)^2; a million rounding errors of c / 127 cost 5.2 c^2.
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert observe(MseObserver(STATIC), x) > 0.98
    x[5] = 8
    assert 1 < observe(MseObserver(STATIC), x) < 3


def test_half_precision_and_zeros():
    x = activations()
    assert observe(PercentileObserver(), x.half()) == observe(PercentileObserver(), x.half().float())
    for make in (AbsmaxObserver, PercentileObserver, lambda: MseObserver(STATIC)):
        assert observe(make(), torch.zeros(3, 4)) == 0
    assert observe(PercentileObserver(50), torch.tensor([0.0, 0.0, 5.0])) == pytest.approx(0, abs=1e-37)


@pytest.mark.parametrize("make", KINDS)
def test_bad_and_missing_data(make):
    for bad in (math.nan, math.inf, -math.inf):
        x = activations()
        x[3, 4] = bad
        with pytest.raises(NumericsError, match="NaN or Inf"):
            make().update(x)
    with pytest.raises(NumericsError, match="no activation"):
        make().absmax()


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_impossible_percentile(percentile):
    with pytest.raises(RecipeError, match="percentile"):
        PercentileObserver(percentile)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_mean_magnitudes_are_those_of_a_loop_however_the_data_is_split(seed, size):
    x = activations(seed)
    observer = ChannelMeanAbs()
    for piece in (x[:0], *x.split(size)):
        observer.update(piece)
    mean = observer.mean()
    assert mean.dtype == torch.float32
    assert mean.tolist() == pytest.approx([math.fsum(map(abs, column)) / 40 for column in x.t().tolist()], rel=1e-6)


def test_mean_magnitudes_of_bad_and_missing_data():
    with pytest.raises(NumericsError, match="no activation"):
        ChannelMeanAbs().mean()
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            ChannelMeanAbs().update(torch.full((2, 3), bad))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 100))
def test_a_sample_does_not_depend_on_how_the_stream_is_cut(tokens, limit, size):
    x = torch.arange(tokens).float()[:, None].expand(tokens, 2)
    sample, whole = RowSample(limit), RowSample(limit)
    for piece in (x[:0], *x.split(size)):
        sample.update(piece)
    whole.update(x)
    rows = sample.rows()
    assert torch.equal(rows, whole.rows()) and len(rows) == min(tokens, limit)
    assert bool((rows[1:, 0] > rows[:-1, 0]).all())  # different tokens, in the order of the stream


def test_a_sample_has_no_liking_for_the_first_tokens_of_sequences():
    sample = RowSample(512)
    for _ in range(32):
        sample.update(torch.arange(256).float()[:, None])
    positions = sample.rows()[:, 0]
    assert 0.4 < positions.mean() / 255 < 0.6
    counts = torch.bincount(positions.long(), minlength=256)
    assert counts[0] <= 6 and counts.max() <= 8  # 2 of each on average


def test_a_sample_outlives_the_batch_that_it_was_taken_from():
    sample, x = RowSample(), torch.ones(3, 2)
    sample.update(x)
    x.zero_()
    assert torch.equal(sample.rows(), torch.ones(3, 2))
    with pytest.raises(NumericsError, match="no activation"):
        RowSample().rows()


def test_several_statistics_see_the_same_stream():
    x, both = activations(), CompositeObserver(ChannelAbsmax(), ChannelMeanAbs())
    for piece in x.split(9):
        both.update(piece)
    absmax, mean = both.parts
    assert torch.equal(absmax.absmax(), x.abs().amax(0))
    assert torch.allclose(mean.mean(), x.abs().mean(0))
