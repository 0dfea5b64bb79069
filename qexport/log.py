"""Where log records go when the command line runs; the library itself configures nothing.

Modules log to loggers of their own names, passes to `qexport.passes.NAME`: what passes and stages decide at INFO,
details at DEBUG, and what users should know though nothing failed as warnings, each once, in a sentence without a
final full stop. A program that imports qexport handles the logger "qexport" as it likes; without a handler Python
prints warnings on stderr.
"""

import logging
import sys

ROOT = "qexport"
_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


class _Lines(logging.Handler):
    """A line on stderr for every record, behind its level if that is a warning, else behind the module that says it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()  # warnings, each of which is shown once: --auto finds them with every try

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.levelno >= logging.WARNING:
            if said in self.said:
                return
            self.said.add(said)
            text = f"{record.levelname.lower()}: {said}"
        else:
            text = f"{record.name.removeprefix(f'{ROOT}.')}: {said}"
        print(text, file=sys.stderr, flush=True)


def configure(verbosity: int = 0) -> None:
    """Show records on stderr, as a command does.

    Args:
        verbosity: -1 shows errors, 0 warnings too, 1 what is decided, 2 and more also details.
    """
    restore()
    logger = logging.getLogger(ROOT)
    logger.setLevel(_LEVELS[max(-1, min(verbosity, 2))])
    logger.addHandler(_Lines())


def restore() -> None:
    """Undo `configure`, for a process that goes on after a command."""
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.NOTSET)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Lines)]:
        logger.removeHandler(handler)


def is_quiet() -> bool:
    """Whether not even warnings are wanted."""
    return not logging.getLogger(ROOT).isEnabledFor(logging.WARNING)
