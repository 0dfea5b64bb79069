"""Which processor this is, as far as kernels and their weight layouts are chosen by it."""

import hashlib
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def instruction_sets() -> frozenset[str] | None:
    """Instruction sets as the kernel of Linux names them; None where they cannot be read."""
    try:
        with _CPUINFO.open() as lines:
            for line in lines:  # the first core's: the file is long, and slow, on large machines
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return None


def fingerprint() -> str:
    """A short name for the machine type and its instruction sets, the same at every call on the same machine."""
    found = instruction_sets()
    what = platform.processor() if found is None else " ".join(sorted(found))
    return f"{platform.machine()} {hashlib.sha256(what.encode()).hexdigest()[:16]}"
