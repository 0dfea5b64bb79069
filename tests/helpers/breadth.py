"""Which cases of a test run by default, and which only among the slow tests."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import pytest

# Families whose models have nothing that the other's have not: biases of q, k and v, a sliding window, norms of
# q and k.
SIBLINGS = {"qwen2": "llama_bias", "mistral": "gemma3", "qwen3": "gemma3"}


def quick(names: Collection[str], among: Iterable[str]) -> list:
    """Parameters of a test: those named, and the others marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in among]


def mark_combinations(items: list[pytest.Item]) -> None:
    """Of a test marked `each_value_once`, mark slow what is not needed for every parameter to take each of its values.

    The n-th case has the n-th value of every parameter, those of a shorter list from their beginning again.
    """
    for cases in _marked(items, "each_value_once"):
        given = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        values = {name: list(dict.fromkeys(row[name] for row in given)) for name in given[0]}
        longest = max(map(len, values.values()))
        needed = [{name: found[n % len(found)] for name, found in values.items()} for n in range(longest)]
        for case, row in zip(cases, given, strict=True):
            if row not in needed:
                case.add_marker(pytest.mark.slow)


def mark_by_default(items: list[pytest.Item], whole: bool = True) -> None:
    """Of a test marked `by_default(*patterns)`, mark slow the cases whose id matches none of the patterns.

    Args:
        whole: every test has all its cases here, so that a pattern without a case is a mistake.

    Raises:
        pytest.UsageError: a pattern matches no case.
    """
    for cases in _marked(items, "by_default"):
        patterns = cases[0].get_closest_marker("by_default").args
        matching = {pattern: [case for case in cases if _matches(case, pattern)] for pattern in patterns}
        if whole and (stale := [pattern for pattern, found in matching.items() if not found]):
            raise pytest.UsageError(f"{cases[0].nodeid.partition('[')[0]} has no case {stale[0]!r}")
        for case in cases:
            if not any(case in found for found in matching.values()):
                case.add_marker(pytest.mark.slow)


def _marked(items: list[pytest.Item], mark: str) -> Collection[list[pytest.Item]]:
    """The cases of each test that is marked so."""
    tests: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker(mark):
            tests.setdefault(item.function, []).append(item)
    return tests.values()


def _matches(case: pytest.Item, pattern: str) -> bool:
    return fnmatchcase(case.callspec.id, pattern)


def mark_siblings(items: list[pytest.Item]) -> None:
    """Mark slow what a test does with a family when the same test does it with a sibling of that (see SIBLINGS)."""
    tests: dict[object, list[tuple[pytest.Item, str]]] = {}
    for item in items:
        for value in getattr(getattr(item, "callspec", None), "params", {}).values():
            if isinstance(value, str) and not item.get_closest_marker("slow"):
                tests.setdefault(item.function, []).append((item, value))
    for cases in tests.values():
        values = {value for _, value in cases}
        for item, value in cases:
            if SIBLINGS.get(value) in values:
                item.add_marker(pytest.mark.slow)
