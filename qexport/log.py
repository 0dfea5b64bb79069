"""What users should know though nothing failed: one line on stderr, unless a program handles the logger "qexport"."""

import logging
import sys

_logger = logging.getLogger("qexport")


def warn(text: str) -> None:
    """Say something in a sentence without a final full stop."""
    _logger.warning("%s", text)


def show_warnings() -> None:
    """Let every warning be a line that begins with "warning:", as a command says it."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)

    if not _logger.handlers:
        _logger.addHandler(Lines())
