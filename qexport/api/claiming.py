"""The folder of an export that several processes make together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import ranks
from ..artifact import owner
from ..artifact.output import WorkFolder, claimed, work_folder


@contextmanager
def claimed_by_first(out: Path, overwrite: bool, model: Path | None = None) -> Iterator[WorkFolder]:
    """As `claimed`: the first of the processes claims the folder, all others see it."""
    if ranks.rank() > 0:
        ranks.first(bool)
        yield WorkFolder(out, overwrite, owner.Lock(work_folder(out), -1, ()))
        return
    with claimed(out, overwrite, model) as work:
        ranks.first(bool)
        yield work
