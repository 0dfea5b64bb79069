"""Commands in processes of their own, which begin where everything is imported already.

A server, started with the first of them, imports what commands need and forks for each: importing takes four seconds,
and most of a command on a tiny model. A test of what the start itself does runs a process of Python's instead.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qexport.cli import main

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["qexport.api.exporting", "qexport.capture.decoder", "qexport.cli", "transformers"])
_PATIENCE = 240  # seconds


class Command:
    """`qexport ...`, or another function, in a process of its own. What it writes goes to two files.

    Args:
        notes: the folder of the files; arguments: what is typed after qexport; work: what runs instead.
    """

    def __init__(self, notes: Path, *arguments: object, work: Callable[..., object] | None = None) -> None:
        notes.mkdir(exist_ok=True)
        self._written = notes / "stdout", notes / "stderr"
        given = tuple(map(str, arguments))
        hears = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        self._process = _FORKED.Process(target=_run, args=(work, given, self._written, hears))
        self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return _text(self._written[0])

    @property
    def stderr(self) -> str:
        return _text(self._written[1])

    def writes(self, words: str) -> bool:
        """Wait until its stderr has these words; whether they came before it ended."""
        end = time.monotonic() + _PATIENCE
        while words not in self.stderr and self._process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        return words in self.stderr

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, patience: float = _PATIENCE) -> int:
        """Its exit code; patience: seconds."""
        self._process.join(patience)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"ran for {patience} seconds and wrote:\n{self.stderr}")
        return self._process.exitcode


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _run(
    work: Callable[..., object] | None, arguments: tuple[str, ...], written: tuple[Path, Path], hears: bool
) -> None:
    for number, file in enumerate(written, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler if hears else signal.SIG_IGN)
    if work is not None:
        work(*arguments)
        return
    sys.argv = ["qexport", *arguments]
    main()
