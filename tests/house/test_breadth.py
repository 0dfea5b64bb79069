"""Of a test with many combinations the default run has each value, and not each combination."""

from types import SimpleNamespace

import pytest

from helpers import breadth


class Case:
    """What pytest collects of a test, as far as the marking reads it."""

    def __init__(self, function, marked: bool, patterns=(), **params):
        self.function, self.nodeid, self.slow = function, f"file.py::{function}", False
        self.callspec = SimpleNamespace(params=params, id="-".join(map(str, params.values())))
        self._marked, self._patterns = marked, patterns

    def get_closest_marker(self, name):
        if name == "by_default" and self._patterns:
            return pytest.mark.by_default(*self._patterns).mark
        return name if self._marked and name == "each_value_once" or self.slow and name == "slow" else None

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


def test_of_two_siblings_one_is_quick_in_every_test_that_has_both():
    both = [Case("one", False, family=f, mask=m) for f in ("mistral", "gemma3", "llama") for m in ("left", "none")]
    alone = [Case("two", False, family=f) for f in ("mistral", "llama")]
    beside_a_slow_one = [Case("three", False, family=f) for f in ("mistral", "gemma3")]
    beside_a_slow_one[1].slow = True
    breadth.mark_siblings([*both, *alone, *beside_a_slow_one, SimpleNamespace()])
    assert [case.slow for case in both] == [True, True, False, False, False, False]
    assert [case.slow for case in alone] == [False, False] and not beside_a_slow_one[0].slow


def test_cases_that_are_not_named_are_slow_and_names_without_a_case_are_a_mistake():
    cases = [Case("one", False, ("a-*", "b-2"), scheme=s, bits=b) for s in "abc" for b in (1, 2)]
    others = [Case("two", False, scheme=s) for s in "ab"]
    breadth.mark_by_default([*cases, *others])
    assert [case.callspec.id for case in cases if not case.slow] == ["a-1", "a-2", "b-2"]
    assert not any(case.slow for case in others)
    with pytest.raises(pytest.UsageError, match=r"file.py::one has no case 'a-\*'"):
        breadth.mark_by_default(cases[2:])
    breadth.mark_by_default(cases[2:], whole=False)  # some of its cases were asked for by name
