"""What in an output folder is the export's and what is the user's: only the first is ever removed."""

import json
import os
import shutil
from pathlib import Path

from . import checksums

COPY, COPY_KEY = "optimized", "key.json"  # the optimized graph that `qexport optimize` keeps in an export
# While this line is in README.md it is qexport's to write again; a card that people took over is theirs.
CARD_MARK = "<!-- Written by qexport; `qexport validate` writes it again while this line is here. -->"
_CARD = "README.md"
INSIDE = ".qexport.work"  # where validation and the like do their work in an export


def is_export(folder: Path) -> bool:
    """Whether a folder is one that an export wrote, by the list of files that it keeps and its manifest."""
    try:
        manifest = json.loads((folder / checksums.MANIFEST_FILE).read_text(encoding="utf-8"))
        ours = {"format", "qexport", "kind"} <= manifest.keys()
    except (OSError, ValueError, AttributeError):
        return False
    return ours and checksums.read(folder) is not None


def foreign(folder: Path) -> list[str]:
    """Files and links in an export that it did not write, and empty folders, by their path in it; sorted."""
    noted = checksums.read(folder)
    ours = {checksums.FILE, *noted.files, *noted.rewritten} if noted else {checksums.FILE}
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        if here.name == INSIDE:
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names = {*files, *links}
        if here.name == COPY:
            names -= copied(Path(place))
        if (here / checksums.MANIFEST_FILE).as_posix() in ours:
            names -= set(checksums.REWRITTEN)
            ours -= {(here / _CARD).as_posix()}
            names |= {_CARD} if _is_own_card(Path(place) / _CARD) else set()
        found += {(here / name).as_posix() for name in names} - ours
        if not folders and not files and here != Path():
            found.append(here.as_posix())
    return sorted(found)


def _is_own_card(path: Path) -> bool:
    """Whether people wrote or took over a model card."""
    return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace")


def copied(copy: Path) -> set[str]:
    """Names of the files of an optimized copy, by its own account; empty where it is none."""
    try:
        return {COPY_KEY, *json.loads((copy / COPY_KEY).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def carry(names: list[str], old: Path, new: Path) -> list[str]:
    """Let files of the user's be in the new folder too, as links to the same bytes where the file system has links.

    One whose name the new folder uses itself gets ".kept" behind it.

    Returns:
        what they are called in the new folder.
    """
    found = []
    for name in names:
        place = name
        while os.path.lexists(new / place):
            place += ".kept"
        source, target = old / name, new / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            target.mkdir()
        else:
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)
        found.append(place)
    return found
