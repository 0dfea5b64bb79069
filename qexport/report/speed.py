"""Speed of an export as `qexport bench` measured it, kept in its report.json."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..artifact.manifest import MANIFEST_FILE
from ..runtime.benchmark import BenchResult, Measurement
from ..validation.report_store import REPORT_FILE, checked, keep

KEY = "bench"


class Speed(BaseModel):
    """Medians on one machine.

    Attributes:
        machine: its processor, as far as the system says; threads: within an operator, None for every physical core.
        load_seconds, memory_bytes, prefill, decode: see `runtime.benchmark.Measurement`.
    """

    model_config = ConfigDict(frozen=True)

    machine: str
    threads: int | None
    load_seconds: float
    memory_bytes: int
    prefill: dict[int, float]
    decode: dict[int, float]


def keep_speed(result: BenchResult) -> None:
    """Keep what was measured in the folders that are exports and can be written."""
    for found in (result.first, result.second):
        if found is not None and _takes(folder := Path(found.folder)):
            keep(folder, KEY, _speed(found, result.threads).model_dump(mode="json"))


def read_speed(whole: Mapping[str, Any], folder: Path) -> Speed | None:
    """What report.json, read already, says of speed; None where nobody measured it.

    Raises:
        InputError: it is damaged.
    """
    return checked(Speed, whole[KEY], folder / REPORT_FILE) if KEY in whole else None


def _takes(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file() and os.access(folder, os.W_OK)


def _speed(found: Measurement, threads: int | None) -> Speed:
    return Speed(
        machine=_processor(), threads=threads, load_seconds=found.load_seconds, memory_bytes=found.memory_bytes,
        prefill=found.prefill, decode=found.decode,
    )  # fmt: skip


def _processor() -> str:
    """`AMD EPYC 9B45`; what Python knows of it elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
