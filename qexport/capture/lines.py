"""Lines of the user's code that nodes were traced from."""

import contextlib
import re
import traceback
from functools import cache
from pathlib import Path

import torch
import transformers
from torch.fx import Node

_TRANSFORMERS = Path(transformers.__file__).parent
_ROOTS = (Path(torch.__file__).parent, Path(__file__).parents[1], Path(contextlib.__file__))  # not the user's
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)')


def innermost(frames: traceback.StackSummary) -> str:
    """The innermost line of the user's code, or of a model of transformers, as an error ends: " at file:line: code"."""
    lines = [frame for frame in frames if _of_model(frame.filename)][-1:]
    return f" at {lines[0].filename}:{lines[0].lineno}: {lines[0].line}" if lines else ""


def line_of(node: Node) -> str:
    """The same for the line that made a node; "" where it is not known."""
    return _innermost_of(node.meta.get("stack_trace") or "")


@cache
def _innermost_of(trace: str) -> str:
    lines = [found for found in _FRAME.findall(trace) if _of_model(found[0])]
    return " at {}:{}: {}".format(*lines[-1]) if lines else ""


@cache
def _of_model(file: str) -> bool:
    if file.startswith("<"):  # code that was made, not read
        return False
    path = Path(file)
    if path.is_relative_to(_TRANSFORMERS):
        return path.is_relative_to(_TRANSFORMERS / "models")
    return not any(path.is_relative_to(root) for root in _ROOTS)
