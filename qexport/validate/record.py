"""report.json: what the export and the validation of a folder keep for later."""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import InputError, write_whole
from .report import Activation, Report

REPORT_FILE = "report.json"
KEY = "validation"


def save(report: Report, folder: Path) -> None:
    """Put the report under "validation" in the folder's report.json, beside what the export wrote; by rename.

    Raises:
        InputError: the folder cannot be written.
    """
    keep(folder, KEY, report.as_dict())


def keep(folder: Path, key: str, value: dict[str, Any]) -> None:
    """Put numbers, strings, lists and null under a key of the folder's report.json, by rename; raises as `save`."""
    path = folder / REPORT_FILE
    whole = _read(path)
    whole[key] = value
    write_whole(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")


def load(folder: str | Path) -> Report | None:
    """The validation in a folder's report.json; None where there is none."""
    data = _read(Path(folder) / REPORT_FILE).get(KEY)
    return None if data is None else Report.model_validate(data)


def exported_activations(folder: Path) -> tuple[Activation, ...]:
    """The quantized activations in a folder's report.json, by the account of the export; none without one."""
    found = []
    for block in _read(folder / REPORT_FILE).get("export", {}).get("blocks", ()):
        for _, what, data in block["changed"].get("QuantizeActivations", ()):
            known = {key: data[key] for key in ("linears", "bits", "kernel", "kernel_without_zeros") if key in data}
            found.append(Activation(block=block["name"], what=what, **known))
    return tuple(found)


def exported_warnings(folder: Path) -> tuple[str, ...]:
    """What the export warned of."""
    return tuple(_read(folder / REPORT_FILE).get("export", {}).get("warnings", ()))


def branch_gains(folder: Path) -> dict[str, float]:
    """By how many dB the low-rank branch of a linear lowers the error of its weight, by the account of the export."""
    gains = {}
    for block in _read(folder / REPORT_FILE).get("export", {}).get("blocks", ()):
        for name, _, data in block["changed"].get("LoRC", ()):
            left = 1 - data["error removed"]
            gains[name] = -10 * math.log10(left) if left > 0 else math.inf
    return gains


def _read(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"unreadable: {error}", place=str(path), remedy="Delete it; it is only a record") from None
    return data if isinstance(data, dict) else {}
