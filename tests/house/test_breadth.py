"""Of a test with many combinations the default run has each value, and not each combination."""

from types import SimpleNamespace

import pytest

from helpers import breadth


class Case:
    """What pytest collects of a test, as far as the marking reads it."""

    def __init__(self, function, marked: bool, **params):
        self.function, self.callspec, self.slow = function, SimpleNamespace(params=params), False
        self._marked = marked

    def get_closest_marker(self, name):
        return name if self._marked and name == "each_value_once" else None

    def add_marker(self, mark):
        assert mark == pytest.mark.slow
        self.slow = True


def test_every_value_is_in_a_quick_case_and_few_cases_are_quick():
    schemes, targets = ("a", "b", "c", "d"), ("cpu", "cuda", None)
    cases = [Case("one", True, scheme=s, target=t) for s in schemes for t in targets]
    others = [Case("two", False, scheme=s) for s in schemes]
    breadth.mark_combinations([*cases, *others])
    quick = [tuple(case.callspec.params.values()) for case in cases if not case.slow]
    assert quick == [("a", "cpu"), ("b", "cuda"), ("c", None), ("d", "cpu")]
    assert not any(case.slow for case in others)


def test_what_is_not_quick_is_slow_and_in_its_place():
    found = breadth.quick(("b",), among=("a", "b", "c"))
    assert found[1] == "b" and [p.values for p in (found[0], found[2])] == [("a",), ("c",)]
    assert all([mark.name for mark in p.marks] == ["slow"] for p in (found[0], found[2]))
