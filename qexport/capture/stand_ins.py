"""What stands in the place of a builtin in the code of a model while torch.export follows it.

Python's own len, int and min make numbers of sizes, and a graph would be one for the sizes of the example.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def standing_in(name: str, instead: Any, files: Iterable[str]) -> Iterator[None]:
    """Let code of these files find something else under the name of a builtin.

    Args:
        files: names of modules; those that have something of this name of their own keep it.
    """
    changed = [place for file in files if file in sys.modules and name not in (place := vars(sys.modules[file]))]
    for place in changed:
        place[name] = instead
    try:
        yield
    finally:
        for place in changed:
            del place[name]
