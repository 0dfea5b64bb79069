"""Every measure of a text on examples small enough to count by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.runtime.sampling import Sampling, probabilities
from qexport.sampling_study.measures import (
    common_prefix,
    distinct,
    prefix_share,
    repetition,
    token_agreement,
    total_variation,
)

TOKENS = st.lists(st.integers(0, 3), max_size=12)


@pytest.mark.parametrize(
    ("first", "second", "prefix", "share", "agreement"),
    [
        ([], [], 0, 1, 1),
        ([1, 2, 3], [1, 2, 3], 3, 1, 1),
        ([1, 2, 3, 4], [1, 9, 3, 4], 1, 1 / 4, 3 / 4),
        ([1, 2], [1, 2, 3, 4], 2, 1 / 2, 1 / 2),  # one text ended, and that is a difference
        ([5], [6], 0, 0, 0),
        ([], [6, 7], 0, 0, 0),
    ],
)
def test_how_alike_two_texts_are(first, second, prefix, share, agreement):
    for one, other in ((first, second), (second, first)):
        assert common_prefix(one, other) == prefix
        assert prefix_share(one, other) == share and token_agreement(one, other) == agreement


@given(TOKENS, TOKENS)
def test_agreement_is_never_less_than_the_common_start(first, second):
    assert 0 <= prefix_share(first, second) <= token_agreement(first, second) <= 1
    assert (prefix_share(first, second) == 1) == (first == second)


@pytest.mark.parametrize(
    ("tokens", "ones", "twos", "repeated"),
    [
        ([1, 2, 3, 4, 5], 1, 1, 0),
        ([7, 7, 7, 7, 7, 7], 1 / 6, 1 / 5, 2 / 3),  # 3 four-grams, one of them new
        ([1, 2, 1, 2, 1, 2], 2 / 6, 2 / 5, 1 / 3),  # 1212 2121 1212
        ([1, 2, 3], 1, 1, None),
        ([4], 1, None, None),
        ([], None, None, None),
    ],
)
def test_how_varied_a_text_is(tokens, ones, twos, repeated):
    assert distinct(tokens, 1) == ones and distinct(tokens, 2) == twos
    assert repetition(tokens) == (None if repeated is None else pytest.approx(repeated))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0, 1, 3, 20, 50]))
def test_total_variation_is_that_of_the_sampled_distributions(seed, temperature, top_k):
    first, second = np.random.default_rng(seed).normal(0, 3, (2, 4, 20)).astype(np.float32)
    sampling = Sampling(temperature, top_k)
    pairs = [(probabilities(a, sampling), probabilities(b, sampling)) for a, b in zip(first, second, strict=True)]
    found = total_variation(torch.from_numpy(first), torch.from_numpy(second), temperature, top_k)
    np.testing.assert_allclose(found, [np.abs(p - q).sum() / 2 for p, q in pairs], atol=1e-6)


def test_total_variation_of_the_likeliest_tokens():
    first = torch.tensor([[0.0, 1.0, 0.5], [3.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 9.0, 0.5], [0.0, 0.0, 0.1]])
    assert total_variation(first, second, 0.0, 50).tolist() == [0, 1]
    assert total_variation(first, first, 0.7, 0).tolist() == [0, 0]
