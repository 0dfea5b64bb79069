"""The output folder of an export: whether it may be made there, who makes it, and how it appears."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, QExportError, writing_to
from . import checksums, owner, scratch, swap
from .ownership import INSIDE, carry, foreign, is_export

_ELSEWHERE = "Choose another folder"
_OLD = "old"  # in a work folder: the export that another one replaces


def check_output(out: Path, overwrite: bool, model: Path | None = None) -> None:
    """Refuse an output folder that cannot be made, or whose place holds what an export must not replace.

    Args:
        model: folder or file that the model is read from, if it is on this machine.

    Raises:
        InputError: as said.
    """
    try:
        _check(out, overwrite, model)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero in it, a loop of links
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be a folder ({why})", place=str(out), remedy=_ELSEWHERE) from error


def _check(out: Path, overwrite: bool, model: Path | None) -> None:
    place, whole = str(out), real(out)
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(work_folder(whole))  # which is the longest of the names that are needed
    if os.path.ismount(whole):
        raise InputError(
            "is a mount point, and an export appears by renaming a folder", place=place,
            remedy="Choose a folder in it",
        )  # fmt: skip
    if os.path.islink(whole):
        target = os.path.realpath(whole)
        if not os.path.exists(target):
            raise InputError(f"is a link to {target}, which is not there", place=place, remedy=_ELSEWHERE)
        raise InputError(f"is a link to {target}", place=place, remedy="Give that path itself, or choose another")
    if os.path.lexists(whole):
        _check_replaceable(whole, place, overwrite, model)
    parent = next(p for p in whole.parents if os.path.lexists(p))
    if not parent.is_dir():
        raise InputError("is not a folder", place=str(parent), remedy=_ELSEWHERE)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("cannot be written", place=str(parent), remedy="Choose a folder you own")


def _check_replaceable(whole: Path, place: str, overwrite: bool, model: Path | None) -> None:
    if not whole.is_dir():
        raise InputError("exists already and is not a folder", place=place, remedy=_ELSEWHERE)
    here = Path.cwd().resolve()
    if whole in (here, *here.parents):
        raise InputError("is the current folder, or one above it", place=place, remedy="Name a folder in it")
    home = Path(os.path.expanduser("~")).resolve()
    if whole in (home, *home.parents):
        raise InputError("is your home, or a folder above it", place=place, remedy="Name a folder in it")
    source = None if model is None else real(model)
    if source is not None and whole in (source, *source.parents):
        raise InputError("is the model's own folder, or one above it", place=place, remedy=_ELSEWHERE)
    if not overwrite:
        raise InputError("exists already", place=place, remedy="Choose another folder or pass --overwrite")
    if not os.access(whole, os.W_OK | os.X_OK | os.R_OK):
        raise InputError("cannot be written", place=place, remedy="Choose a folder you own")
    info, above = whole.stat(), whole.parent.stat()
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, info.st_uid, above.st_uid):
        raise InputError("belongs to another user", place=place, remedy="Choose a folder you own")
    if any(whole.iterdir()) and not is_export(whole):
        raise InputError(
            f"is not an export (or one without {checksums.FILE}), so it will not be replaced", place=place,
            remedy="Move it away, or choose another folder",
        )  # fmt: skip


def real(path: Path) -> Path:
    """The absolute path of a file or folder, which need not be there; links on the way to it followed, not itself."""
    whole = Path(os.path.abspath(path))
    return whole.parent.resolve() / whole.name if whole.name else whole


def work_folder(out: Path) -> Path:
    """Where the unfinished export of an output folder is."""
    whole = real(out)
    return whole.parent / f".{whole.name}.work"


class WorkFolder:
    """An export in the making, see `claimed`.

    Attributes:
        given, out: the output folder as the user named it, and its absolute path.
        folder: where its temporary things are.
        blocks: folder of its finished blocks, made by who writes them; what an interrupted export goes on from.
        kept: files of the user's that the new folder took over from the one it replaced, by name.
    """

    def __init__(self, out: Path, overwrite: bool, lock: owner.Lock):
        self.given, self.out, self._overwrite, self._lock = out, real(out), overwrite, lock
        self.folder = lock.folder
        self.blocks = self.folder / "blocks"
        self.kept: list[str] = []
        self._new, self._old, self._moving = (self.folder / name for name in ("new", _OLD, "moving"))

    def settle(self) -> None:
        """Restore or remove what a dead owner left, but its finished blocks."""
        swap.restore(self.out, self._old)
        for name in self._lock.found:
            if self.folder / name != self.blocks:
                owner.remove(self.folder / name)

    @contextmanager
    def appearing(self) -> Iterator[Path]:
        """A folder that takes the place of the output folder when the `with` ends without an error.

        Raises:
            InputError: something has come to its place meanwhile, or the disk is full.
        """
        try:
            with explained(self.out):
                self._new.mkdir()
                yield self._new
                checksums.write(self._new)
            check_output(self.out, self._overwrite)
            with explained(self.out):
                self._appear()
        finally:
            owner.remove(self._new)
            owner.remove(self._old)

    def _appear(self) -> None:
        self._moving.touch()  # with it and an output, finished blocks are of an export that is done
        if not os.path.lexists(self.out):
            swap.put(self._new, self.out, self._old)
            return
        with inside(self.out, "replacing it by a new export"):
            self.kept = carry(foreign(self.out), self.out, self._new)
            swap.put(self._new, self.out, self._old)

    def left_by_a_refused_run(self) -> None:
        """Tidy up for a run that will not begin: what is left of an export that was killed when it was done goes."""
        done = self._moving.exists() or not self.blocks.exists()
        self.settle()
        self._remove() if done else self._lock.release()

    def _remove(self) -> None:
        """Remove the work folder; what says that its blocks are of an export that is done goes after them."""
        owner.remove(self.blocks)
        self._lock.remove()

    def discard(self) -> None:
        """Forget the finished blocks: going on from them would end as this did."""
        owner.remove(self.blocks)

    def _finish(self, error: BaseException | None) -> None:
        done = len(list(self.blocks.rglob("*.safetensors"))) if error is not None else 0
        if not done:
            self._remove()
            return
        self._lock.release()
        if error is None or isinstance(error, QExportError):
            return  # which says itself what helps
        error.add_note(f"{done} finished blocks are kept in {self.folder}: the same export with --resume goes on there")


class PartFolder(WorkFolder):
    """A part of an export that has several: a folder in the new one, its finished blocks beside those of the others.

    Args:
        whole: the export; new: its folder in the making, see `WorkFolder.appearing`.
        name: of the part's folder.
    """

    def __init__(self, whole: WorkFolder, new: Path, name: str):
        self.given = self.out = new / name
        self.folder, self.blocks, self.kept = whole.folder, whole.blocks / name, []

    @contextmanager
    def appearing(self) -> Iterator[Path]:
        with explained(self.out):
            self.out.mkdir()
            yield self.out
            checksums.write(self.out)


@contextmanager
def claimed(out: Path, overwrite: bool, model: Path | None = None) -> Iterator[WorkFolder]:
    """Claim an output folder for this process, from now until the `with` ends.

    Finished blocks stay when an error ends it, for --resume; everything else of this run is gone then.

    Args:
        model: as `check_output` takes it.

    Raises:
        InputError: another process works on the same output (`owner.Busy`), or see `check_output`.
    """
    try:
        check_output(out, overwrite, model)
    except InputError:
        _tidy(out)
        raise
    folder = work_folder(out)
    made = [p for p in folder.parents if not p.exists()]
    with writing_to(folder.parent, "Choose another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    failed: BaseException | None = None
    try:
        work = WorkFolder(out, overwrite, owner.take(folder, "exporting"))
        try:
            scratch.sweep([scratch.system(), folder.parent])
            work.settle()
            if os.path.lexists(work.out):
                check_output(out, overwrite, model)  # another export may have finished, or a killed one was restored
                inside_free(work.out)
            yield work
        except BaseException as error:
            failed = error
            raise
        finally:
            work._finish(failed)
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()  # if nothing came into it


def check_there(out: Path) -> None:
    """Refuse a folder that is not there, once an export that a killed one had moved aside is back in its place.

    Raises:
        InputError: as said; or the process that moved it aside is alive (`owner.Busy`), or it cannot be moved back.
    """
    restore(out)
    if not os.path.isdir(out):
        raise InputError("no such folder", place=str(out), remedy="Give the folder that `qexport export` wrote")


def restore(out: Path) -> None:
    """Bring an export back that another one had moved aside when it was killed, if there is one; see `swap.put`."""
    place = Path(os.path.abspath(out))
    if os.path.lexists(place) or not os.path.isdir(place.parent):
        return
    aside = work_folder(place) / _OLD
    if not os.path.isdir(aside):
        return
    try:
        WorkFolder(place, False, owner.take(aside.parent, "restoring the export")).left_by_a_refused_run()
    except owner.Busy:
        raise
    except (OSError, InputError):
        raise InputError(
            f"was moved to {aside} by an export that was killed, and cannot be moved back", place=str(out),
            remedy="Move it back",
        ) from None  # fmt: skip


def _tidy(out: Path) -> None:
    """Remove what a killed export left beside its output, where the next one is refused because that is there."""
    with suppress(OSError, ValueError, RuntimeError, InputError):
        folder = work_folder(out)
        if folder.is_dir() and os.path.lexists(out):
            WorkFolder(out, False, owner.take(folder, "tidying up")).left_by_a_refused_run()


@contextmanager
def inside(folder: Path, what: str) -> Iterator[Path]:
    """Claim a finished export for work in it: yields a folder for temporary things in it, gone after the `with`.

    What killed processes left there, and in the system's folder for temporary files, is removed.

    Raises:
        InputError: another process works there (`owner.Busy`), or it cannot be written.
    """
    lock = owner.take(folder / INSIDE, what)
    try:
        scratch.sweep([scratch.system(), folder, folder.parent])
        for name in lock.found:
            owner.remove(lock.folder / name)
        yield lock.folder
    finally:
        lock.remove()


def inside_free(folder: Path) -> None:
    """Raise Busy where another process works in an export."""
    if (folder / INSIDE).exists():
        with inside(folder, "looking"):
            pass


def explained(place: Path):
    """Turn a full disk or a refused write into an InputError that knows of --resume."""
    return writing_to(place, "Free some space; --resume goes on from there")
