"""Who works in a folder: an owner file that the system unlocks when its process ends, however that ends.

A folder with temporary things belongs to the process that holds the lock of its owner file. One whose lock is free was
left behind by a process that was killed, and whoever takes the lock may remove or go on with what is there. A folder
without an owner file is nobody's of ours and is left alone.
"""

import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path

import psutil

from ..errors import InputError, writing_to

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module that may be missing

OWNER_FILE = "qexport-owner.json"
_FREE_SPACE = "Free some space there"
_LENGTH = 1024  # of an owner file
_UNTIL_SIGNED = 2.0  # seconds that a process which just got the lock has to write down who it is


class Busy(InputError):
    """Another process works in the folder."""


class Lock:
    """A folder that this process works in, see `take`.

    Attributes:
        folder: with the owner file in it.
        found: what a dead owner left in it, by name; empty for a new folder.
    """

    def __init__(self, folder: Path, handle: int, found: tuple[str, ...]):
        self.folder, self.found, self._handle = folder, found, handle

    def release(self) -> None:
        """Give the folder up and leave it as it is: its owner file says that this process made it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Remove the folder with all that is in it, the owner file last: what is left of it after a kill is known."""
        try:
            for name in os.listdir(self.folder):
                if name != OWNER_FILE:
                    remove(self.folder / name)
            if fcntl is None:
                self.release()  # what is open cannot be removed there
            (self.folder / OWNER_FILE).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError:
            pass  # another process came between, or a file cannot be removed: the next run tries again
        self.release()


def take(folder: Path, what: str) -> Lock:
    """Make `folder`, or take over what a dead process left there.

    Args:
        folder: whose parent exists.
        what: what this process does there, for those who find the folder taken.

    Raises:
        Busy: a living process works there.
        InputError: there is something that no run of ours made, or the place cannot be written.
    """
    while True:
        with writing_to(folder, _FREE_SPACE):
            _make(folder)
            try:
                found = tuple(sorted(name for name in os.listdir(folder) if name != OWNER_FILE))
                if found and not (folder / OWNER_FILE).is_file():
                    raise InputError(
                        "is in the way: qexport keeps unfinished work there, and this is something else",
                        place=str(folder),
                        remedy="Move it away",
                    )  # fmt: skip
                handle = os.open(folder / OWNER_FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            except FileNotFoundError:
                continue  # its last owner removed it just now
        try:
            _lock(handle, folder, what)
        except BaseException:
            os.close(handle)
            raise
        lock = Lock(folder, handle, found)
        if _same(handle, folder / OWNER_FILE):
            try:
                with writing_to(folder, _FREE_SPACE):
                    _write(handle, what)
                return lock
            except BaseException:
                lock.release() if found else lock.remove()
                raise
        lock.release()


def clear(folder: Path) -> bool:
    """Remove a folder that a dead process made and has nothing worth keeping; False where it is not such a one."""
    path = folder / OWNER_FILE
    try:
        names = set(os.listdir(folder))
        if names - {OWNER_FILE} and _read(path) is None:
            return False
        if not names:
            folder.rmdir()
            return True
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    lock = Lock(folder, handle, ())
    try:
        _lock(handle, folder, "")
        if _same(handle, path):
            lock.remove()
        return not folder.exists()
    except Busy:
        return False
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(0o700, exist_ok=True)
    except FileExistsError:
        raise InputError(
            "is in the way: qexport keeps unfinished work in a folder of this name", place=str(folder),
            remedy="Move it away",
        ) from None  # fmt: skip


def _lock(handle: int, folder: Path, what: str) -> None:
    """Lock the owner file, or raise Busy."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    except BlockingIOError:
        raise _busy(folder) from None
    except OSError:
        pass  # a file system without locks
    # What the file says has to do: a process of this machine that was started when it says.
    if _living(folder):
        raise _busy(folder)


def _living(folder: Path) -> dict | None:
    """What the owner file says of an owner that may be at work; None where it says of none."""
    owner = _read(folder / OWNER_FILE)
    return owner if owner and _alive(owner) else None


def _alive(owner: dict) -> bool:
    """Whether the owner may be at work: a process of another machine always may."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        started = psutil.Process(owner["pid"]).create_time()
    except psutil.Error:
        return False
    return abs(started - owner["started"]) < 1


def _busy(folder: Path) -> Busy:
    # Between another's lock and its signature the file is empty, or says who died there.
    until = time.monotonic() + _UNTIL_SIGNED
    while (owner := _living(folder)) is None and time.monotonic() < until:
        time.sleep(0.02)
    who = "another process"
    if owner:
        since = time.strftime("%H:%M:%S", time.localtime(owner["since"]))
        who = f"process {owner['pid']} on {owner['host']} ({owner['what']}, since {since})"
    return Busy(f"{who} is at work there", place=str(folder), remedy="Wait until it is done, or choose another folder")


def _same(handle: int, path: Path) -> bool:
    """Whether the open file is the one that goes by this path: another owner may have removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _write(handle: int, what: str) -> None:
    owner = {
        "qexport": "unfinished work of this process; the next run goes on with it or removes it",
        "run": uuid.uuid4().hex, "pid": os.getpid(), "started": psutil.Process().create_time(),
        "host": socket.gethostname(), "what": what, "since": time.time(),
    }  # fmt: skip
    os.pwrite(handle, json.dumps(owner).encode().ljust(_LENGTH), 0)  # at once and over what was there, never half


def _read(path: Path) -> dict | None:
    """What an owner file says; None where it is none, or not yet written."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if {"run", "pid", "started", "host", "what", "since"} <= owner.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
