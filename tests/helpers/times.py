"""`pytest --times`: processor seconds of every test, by room and file, on as many workers as there are.

Seconds of the processor, the processes that a test starts among them (but those of commands.py): unlike those of a
clock they do not grow with what else the machine does. What a fixture costs counts for the first test that asks for it.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

MOST = 40  # files and tests that the summary names
_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--times", action="store_true", help="print processor seconds by room, file and test")
    parser.addoption("--times-to", metavar="FILE.csv", help="write those of every test to a file besides")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not item.config.getoption("--times"):
        return (yield)
    item.stash[_STARTED] = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _STARTED in item.stash:
        now = _seconds()
        report.user_properties = [*report.user_properties, ("processor seconds", now - item.stash[_STARTED])]
        item.stash[_STARTED] = now
    return report


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--times"):
        return
    tests = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, seconds in getattr(report, "user_properties", ()):
                if name == "processor seconds":
                    tests[report.nodeid] += seconds
    files, rooms = Counter(), Counter()
    for test, seconds in tests.items():
        file = test.partition("::")[0]
        files[file] += seconds
        rooms[str(Path(file).parent)] += seconds
    for title, found in (("tests", tests), ("files", files), ("rooms", rooms)):
        terminalreporter.section(f"processor seconds: {title}")
        for name, seconds in found.most_common(MOST):
            terminalreporter.write_line(f"{seconds:8.2f}  {name}")
    terminalreporter.write_line(f"{sum(tests.values()):8.2f}  in all {len(tests)} tests")
    if file := terminalreporter.config.getoption("--times-to"):
        lines = (f'{seconds:.3f},"{name}"\n' for name, seconds in sorted(tests.items()))
        Path(file).write_text("".join(lines))



def _seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])
