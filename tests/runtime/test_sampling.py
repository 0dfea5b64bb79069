import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import InputError
from qexport.runtime.sampling import Sampling, choose, probabilities

# Whole quarters: ties would make the order, and so the reference, a matter of rounding.
LOGITS = st.lists(st.integers(-80, 80).map(lambda x: x / 4), min_size=1, max_size=12, unique=True)


def reference(logits, temperature, top_k, top_p):
    """Distribution by the definition, token by token."""
    weights = {i: np.exp(np.float64(x) / temperature - max(logits) / temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    ranked = ranked[: top_k or None]
    total, kept, reached = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        reached += weights[i] / total
        if top_p < 1 and reached >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(logits))])


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.3, 3), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.83, 1.0]))
def test_distribution_follows_the_definition(logits, temperature, top_k, top_p):
    found = probabilities(np.array(logits, np.float32), Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, reference(logits, temperature, top_k, top_p), rtol=1e-9, atol=1e-15)


def test_of_equal_logits_the_first_ones_are_kept():
    found = probabilities(np.array([1, 3, 1, 2, 1, 1], np.float32), Sampling(top_k=4))
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32))
    generator = np.random.default_rng(0)
    counts = np.bincount([choose(logits, Sampling(), [generator])[0] for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.7], atol=0.03)  # four standard deviations of 4000 draws


def test_without_sampling_the_likeliest_token_is_taken():
    assert choose(np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], np.float16), None, None).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_impossible_settings_are_input_errors(wrong):
    with pytest.raises(InputError):
        Sampling(**wrong)
