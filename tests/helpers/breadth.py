"""Which cases of a test run by default, and which only among the slow tests."""

from collections.abc import Collection, Iterable

import pytest


def quick(names: Collection[str], among: Iterable[str]) -> list:
    """Parameters of a test: those named, and the others marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in among]


def mark_combinations(items: list[pytest.Item]) -> None:
    """Of a test marked `each_value_once`, mark slow what is not needed for every parameter to take each of its values.

    The n-th case has the n-th value of every parameter, those of a shorter list from their beginning again.
    """
    tests: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("each_value_once"):
            tests.setdefault(item.function, []).append(item)
    for cases in tests.values():
        given = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        values = {name: list(dict.fromkeys(row[name] for row in given)) for name in given[0]}
        longest = max(map(len, values.values()))
        needed = [{name: found[n % len(found)] for name, found in values.items()} for n in range(longest)]
        for case, row in zip(cases, given, strict=True):
            if row not in needed:
                case.add_marker(pytest.mark.slow)
