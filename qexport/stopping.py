"""Signals that end a program: raised as an exception that no library takes for its own, and not lost on the way."""

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .progress import Progress, announce

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, kill, a closed terminal
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(BaseException):
    """A signal came. No KeyboardInterrupt: command-line libraries make an exit of their own of that."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that a signal ended."""
        return 128 + self.number

    def __str__(self) -> str:
        """What happened, and what cleaning up had to say."""
        what = "interrupted" if self.number == signal.SIGINT else f"stopped by {signal.Signals(self.number).name}"
        return ". ".join([what, *dict.fromkeys(_notes(self, set()))])


def _notes(error: BaseException | None, seen: set[int]) -> list[str]:
    if error is None or id(error) in seen:
        return []
    seen.add(id(error))
    before = [*_notes(error.__cause__, seen), *_notes(error.__context__, seen)]
    return [*before, *getattr(error, "__notes__", ())]


@contextmanager
def raising_stopped():
    """Raise Stopped when a signal comes that would end the program; those that are ignored stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number, frame) -> None:
    raise Stopped(number)


class Remembered:
    """Remembers a signal, because the exception alone gets lost.

    Where it arrives while native code calls back into Python, that code drops it or raises an error of its own instead.
    So the next progress raises it again, and whatever leaves the `with` after it is what the signal's handler raises.
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self._before: dict[int, Callable] = {}

    def __enter__(self) -> "Remembered":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    self._before[number] = handler
                    signal.signal(number, self._remember)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came is not None and (kind is None or issubclass(kind, Exception)):
            try:
                self.check()
            except BaseException as stop:
                raise stop from error

    def check(self) -> None:
        """Raise again what was lost."""
        if self._came is not None:
            self._before[self._came](self._came, None)

    def checked(self, show: Progress) -> Progress:
        """A progress callback that raises what was lost."""
        return _Checked(self, show)

    def _remember(self, number, frame) -> None:
        self._came = number
        self._before[number](number, frame)


@dataclass(frozen=True)
class _Checked:
    signals: Remembered
    show: Progress

    def __call__(self, stage: str, what: str, done: int, total: int) -> None:
        self.signals.check()
        self.show(stage, what, done, total)

    def expect(self, stages: Sequence[str]) -> None:
        announce(self.show, *stages)
