from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.mixed_precision.allocate import SchemeChoice, within_bytes, within_kl

CHOICES = st.lists(
    st.builds(SchemeChoice, st.just("s"), st.integers(1, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4
)
ITEMS = st.lists(CHOICES, min_size=1, max_size=5)


def every(items):
    for picked in product(*items):
        yield sum(c.bytes for c in picked), sum(c.kl for c in picked)


@given(ITEMS, st.integers(1, 300))
def test_the_budget_is_kept_and_the_smallest_choices_always_fit(items, most):
    found = within_bytes(items, most)
    least = sum(min(c.bytes for c in choices) for choices in items)
    assert (found is None) == (least > most)
    if found is not None:
        assert found.bytes <= most
        assert all(choice in choices for choice, choices in zip(found.choices, items, strict=True))


@given(ITEMS)
def test_with_room_for_everything_everything_is_at_its_best(items):
    found = within_bytes(items, sum(max(c.bytes for c in choices) for choices in items))
    assert found.kl == pytest.approx(sum(min(c.kl for c in choices) for choices in items))


@given(ITEMS, st.floats(0, 40, allow_nan=False))
def test_the_kl_is_kept_where_it_can_be_and_what_is_spent_is_the_best_for_its_bytes(items, most):
    found = within_kl(items, most)
    reachable = sum(min(c.kl for c in choices) for choices in items)
    if found is None:
        assert reachable > most - 1e-9
        return
    assert found.kl <= most + 1e-9
    better = [kl for size, kl in every(items) if size <= found.bytes]
    assert found.kl == pytest.approx(min(better))  # the walk meets this budget exactly, so it is the best for it


def test_bytes_go_where_they_gain_the_most():
    cheap = [SchemeChoice("4", 10, 1.0), SchemeChoice("8", 20, 0.9)]
    worth = [SchemeChoice("4", 10, 5.0), SchemeChoice("8", 20, 0.1)]
    assert [c.scheme for c in within_bytes([cheap, worth], 30).choices] == ["4", "8"]
    assert [c.scheme for c in within_kl([cheap, worth], 2.0).choices] == ["4", "8"]


def test_a_step_that_does_not_fit_leaves_room_for_smaller_ones():
    large = [SchemeChoice("4", 10, 9.0), SchemeChoice("8", 100, 0.0)]
    small = [SchemeChoice("4", 10, 0.2), SchemeChoice("8", 12, 0.1)]
    assert [c.scheme for c in within_bytes([large, small], 25).choices] == ["4", "8"]
