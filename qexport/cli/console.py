"""What the command line shows: results as tables on stdout, progress on stderr, other libraries' chatter nowhere."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..formatting import duration
from ..log import is_quiet
from ..progress import no_progress
from ..stopping import Remembered

# Where no terminal can redraw a bar, a stage prints about this many lines.
_LINES = 8
_MOMENT = 2.0  # seconds


def quiet_libraries() -> None:
    """Silence warnings and progress bars of libraries about things that a user of this program cannot change."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # for bars that no library's switch reaches; tqdm reads it once
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout: columns of numbers to the right, text folded where the terminal is too narrow."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numbers = rows and all(isinstance(row[index], (int, float)) for row in rows)
        # Names stay whole: they are what people copy.
        whole = index == 0 and max((len(str(row[0])) for row in rows), default=0) <= 48
        table.add_column(name, justify="right" if numbers else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    # Without a terminal nobody wants lines broken at 80 columns: other programs read them.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    with console.capture() as text:
        console.print(table)
    print(*(line.rstrip() for line in text.get().splitlines()), sep="\n")


def note(text: object) -> None:
    """A line on stderr that tells about the work, unless --quiet was given."""
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def showing_progress():
    """Yields a callback (stage, what, done, total) that draws bars on a terminal and prints a few lines elsewhere.

    Nothing of it where --quiet was given. Ctrl-C inside the `with` is not lost: see `Remembered`.
    """
    with Remembered() as signals:
        if is_quiet():
            yield signals.checked(no_progress)
        elif sys.stderr.isatty():
            with _bars() as show:
                yield signals.checked(show)
        else:
            yield signals.checked(_Lines())


class _Numbers:
    """Which of how many stages one is, of those that were announced."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def expect(self, stages: Sequence[str]) -> None:
        for stage in stages:
            self._places.setdefault(stage, len(self._places) + 1)

    def titled(self, stage: str) -> str:
        """The name of a stage, behind its number if it has one."""
        place = self._places.get(stage)
        return stage if place is None or len(self._places) == 1 else f"[{place}/{len(self._places)}] {stage}"


class _Bars(_Numbers):
    """Progress as bars, one for each stage."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, what: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, what=what)
        self._bars.update(
            self._tasks[stage], description=self.titled(stage), completed=done, total=total, what=what
        )


@contextmanager
def _bars():
    columns = (
        TextColumn("{task.description:<15}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars)


class _Lines(_Numbers):
    """Progress as lines: the first step of a stage, its last, and a few between."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}  # when a stage was first heard of, and how far it was

    def __call__(self, stage: str, what: str, done: int, total: int) -> None:
        part = done * _LINES // max(total, 1)
        self._began.setdefault(stage, (time.monotonic(), done))
        if self._shown.get(stage) != part:
            self._shown[stage] = part
            line = f"{self.titled(stage)} {done}/{total} {what}".rstrip() + self._left(stage, done, total)
            print(line, file=sys.stderr, flush=True)

    def _left(self, stage: str, done: int, total: int) -> str:
        """What is left of a stage that takes longer than a moment, by its speed so far."""
        began, first = self._began[stage]
        taken = time.monotonic() - began
        if taken < _MOMENT or not first < done < total:
            return ""
        return f" ({duration(taken / (done - first) * (total - done))} left)"
