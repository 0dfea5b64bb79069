"""What the command line shows: results as tables on stdout, progress on stderr, other libraries' chatter nowhere."""

import json
import os
import sys
import time
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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


@contextmanager
def _bars():
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, what: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, what=what)
            bars.update(tasks[stage], completed=done, total=total, what=what)

        yield show


class _Lines:
    """Progress as lines: the first step of a stage, its last, and a few between."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}  # when a stage was first heard of, and how far it was

    def __call__(self, stage: str, what: str, done: int, total: int) -> None:
        part = done * _LINES // max(total, 1)
        self._began.setdefault(stage, (time.monotonic(), done))
        if self._shown.get(stage) != part:
            self._shown[stage] = part
            line = f"{stage} {done}/{total} {what}".rstrip() + self._left(stage, done, total)
            print(line, file=sys.stderr, flush=True)

    def _left(self, stage: str, done: int, total: int) -> str:
        """What is left of a stage that takes longer than a moment, by its speed so far."""
        began, first = self._began[stage]
        taken = time.monotonic() - began
        if taken < _MOMENT or not first < done < total:
            return ""
        return f" ({duration(taken / (done - first) * (total - done))} left)"
