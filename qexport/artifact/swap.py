"""Putting a finished folder in the place of another one, without an instant in which neither is there."""

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places at once; False where the system has no such call.

    Raises:
        OSError: as a rename.
    """
    call = _renameat2()
    if call is None:
        return False
    sys.audit("qexport.exchange", str(one), str(other))
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def put(new: Path, out: Path, aside: Path) -> None:
    """Move the folder `new` to `out`; what was there is afterwards at `new` or `aside`.

    Where the two cannot be exchanged, `out` is missing between two renames, and `restore` brings the old one back
    after a kill.

    Raises:
        OSError: it cannot be moved; then everything is where it was.
    """
    if not os.path.lexists(out):
        os.rename(new, out)
    elif not exchange(new, out):
        os.rename(out, aside)
        try:
            os.rename(new, out)
        except BaseException:
            restore(out, aside)
            raise


def restore(out: Path, aside: Path) -> None:
    """Bring back what `put` moved aside, if the new folder did not follow."""
    if os.path.lexists(aside) and not os.path.lexists(out):
        os.rename(aside, out)


@cache
def _renameat2():
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
