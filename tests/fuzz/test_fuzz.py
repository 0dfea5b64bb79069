"""Damaged inputs end in one sentence: a few of each kind always, a thousand with the slow tests (see runner.py)."""

import pytest

from fuzz import runner
from fuzz.__main__ import main
from helpers.commands import Command

MOST = 6 << 30  # bytes of memory: templates may write a text of a gigabyte, which jinja's sandbox allows


def fuzz(count, report):
    """Run mutations in a process that has no threads yet, as it forks."""
    command = Command(report.parent / "notes", count, report, work=main)
    assert command.wait(patience=60 + 10 * count) == 0, command.stderr
    lines = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(lines[0][1:], map(int, row[1:]), strict=True)) for row in lines[1:]}


def check(found, count):
    assert set(found) == {*runner.KINDS, "all"}
    whole = found["all"]
    assert whole["tracebacks"] == whole["hangs"] == 0
    assert whole["done"] + whole["refused"] == whole["mutations"] and abs(whole["mutations"] - count) < 0.1 * count
    assert whole["done"] and whole["refused"] and whole["MB, most"] < MOST / 1e6


def test_a_few_damaged_inputs(tmp_path):
    check(fuzz(14, tmp_path / "fuzz.md"), 14)  # every kind, most of them once


@pytest.mark.slow
def test_a_thousand_damaged_inputs(tmp_path):
    found = fuzz(1000, tmp_path / "fuzz.md")
    check(found, 1000)
    assert all(row["done"] and row["refused"] for row in found.values())  # no kind is refused or taken whatever it says


def test_a_number_names_a_damage_for_ever(tmp_path):
    file = tmp_path / "config.json"
    found = set()
    for _ in range(2):
        file.write_text('{"a": 1, "b": [1, 2, {"c": "d"}]}')
        runner.mutate(file, runner.Random("config.json 7"))
        found.add(file.read_text())
    assert len(found) == 1


def test_what_a_command_ends_with_is_judged():
    def status(code):
        return code << 8

    assert runner._judged(status(0), "quantize 1/3\n") == "done"
    assert runner._judged(status(2), "quantize 1/3\nerror: model: is no model. Give one\n") == "refused"
    assert runner._judged(status(2), "error: model: two\nlines\n") == "traceback"
    assert runner._judged(status(1), "Traceback (most recent call last):\nValueError\n") == "traceback"
    assert runner._judged(9, "") == "traceback"
