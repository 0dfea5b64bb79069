import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.report.scales import STEPS, log_ticks, spread, step, ticks, whole_ticks, widened

numbers = st.floats(-1e9, 1e9, allow_nan=False, allow_infinity=False)


@given(numbers, st.floats(1e-6, 1e9), st.integers(2, 9))
def test_ticks_are_few_even_and_inside(low, width, most):
    high = low + width
    if not high > low:
        return
    found = ticks(low, high, most)
    room = 1e-6 * max(abs(low), abs(high), width)
    assert 1 <= len(found) <= most + 1 and found == sorted(found)
    assert len(found) == 1 or all(low - room <= t <= high + room for t in found)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert all(math.isclose(g, gaps[0], rel_tol=1e-3, abs_tol=room) for g in gaps)


def test_ticks_are_round():
    assert ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    assert ticks(15, 60, 6) == [20, 30, 40, 50, 60]
    assert ticks(0, 0.045) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert ticks(5, 5) == [5]
    assert whole_ticks(0, 3) == [0, 1, 2, 3]


@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e9))
def test_log_ticks_are_inside(low, factor):
    found = log_ticks(low, low * factor)
    assert 1 <= len(found) <= 16 and all(low * 0.999 <= t <= low * factor * 1.001 for t in found)


def test_log_ticks_are_powers_of_ten_on_a_long_axis():
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(0.9, 12) == pytest.approx([1, 2, 5, 10])


def test_an_axis_shows_all_and_more():
    assert widened([3.0]) == pytest.approx((2.82, 3.18)) and widened([0.0]) == (-1.0, 1.0)
    low, high = widened([1.0, 2.0], from_zero=True)
    assert low == 0 and high > 2
    assert widened([1.0, 100.0], log=True) == (0.8, 125.0)


def test_steps_of_the_colour_scale():
    assert [step(s) for s in (0, 0.5, 1, -1, 2)] == [0, STEPS // 2, STEPS - 1, 0, STEPS - 1]


@given(st.lists(st.floats(-50, 150), max_size=12), st.floats(1, 30))
def test_spread_places_are_inside_in_order_and_apart(places, gap):
    found = spread(places, gap, 0.0, 100.0)
    order = sorted(range(len(places)), key=lambda i: places[i])
    apart = min(gap, 100.0 / max(len(places) - 1, 1))
    assert all(-1e-9 <= y <= 100 + 1e-9 for y in found)
    assert all(found[b] - found[a] >= apart - 1e-9 for a, b in zip(order, order[1:], strict=False))


def test_spread_moves_no_more_than_it_has_to():
    assert spread([10.0, 50.0, 90.0], 10, 0, 100) == [10, 50, 90]
    assert spread([50.0, 90.0, 50.0], 10, 0, 100) == [45, 90, 55]
    assert spread([0.0, 0.0, 99.0], 10, 0, 100) == [0, 10, 99]
