"""report.json: what the export and the validation of a folder keep for later."""

import json
import math
import os
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..artifact.files import read_json
from ..artifact.scratch import write_whole
from ..errors import InputError
from .report import Activation, Report

Model = TypeVar("Model", bound=BaseModel)
_REMEDY = "Delete it; it is only a record"
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
    path = Path(folder) / REPORT_FILE
    data = _read(path).get(KEY)
    return None if data is None else checked(Report, data, path)


def exported_activations(folder: Path) -> tuple[Activation, ...]:
    """The quantized activations in a folder's report.json, by the account of the export; none without one."""
    found = []
    for block in account(folder).blocks:
        for _, what, data in block.changed.get("QuantizeActivations", ()):
            known = {key: data[key] for key in ("linears", "bits", "kernel", "kernel_without_zeros") if key in data}
            found.append(checked(Activation, {"block": block.name, "what": what, **known}, folder / REPORT_FILE))
    return tuple(found)


def exported_warnings(folder: Path) -> tuple[str, ...]:
    """What the export warned of."""
    return account(folder).warnings


def branch_gains(folder: Path) -> dict[str, float]:
    """By how many dB the low-rank branch of a linear lowers the error of its weight, by the account of the export."""
    gains = {}
    for block in account(folder).blocks:
        for name, _, data in chain.from_iterable(block.changed.values()):
            removed = data.get("error removed")
            if isinstance(removed, int | float):
                gains[name] = -10 * math.log10(1 - removed) if removed < 1 else math.inf
    return gains


class _Block(BaseModel):
    """What passes did to a block: by pass, (place, what, numbers) of every change."""

    name: str
    changed: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {}


class _Step(BaseModel):
    """A pass of the recipe, and whether it promised that what the model computes stays."""

    name: str
    keeps_values: bool


class Account(BaseModel):
    """What an export says of itself, as far as it is read again.

    Attributes:
        blocks: what passes did to each.
        warnings: what it warned of.
        passes: what ran; None where that is not known.
        tuned: what training of the whole model did; empty without.
    """

    blocks: tuple[_Block, ...] = ()
    warnings: tuple[str, ...] = ()
    passes: tuple[_Step, ...] | None = None
    tuned: dict[str, Any] = {}


def account(folder: Path) -> Account:
    """What report.json keeps of the export.

    Raises:
        InputError: it is damaged.
    """
    path = folder / REPORT_FILE
    return checked(Account, _read(path).get("export", {}), path)


def checked(kind: type[Model], data: Any, path: Path) -> Model:
    """Data of a record as what they are; InputError names the file and the first key that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part)[:60] for part in first["loc"])
        raise InputError(
            f"is damaged, or of another version of qexport ({at}: {first['msg']})", place=str(path), remedy=_REMEDY
        ) from None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, _REMEDY) if os.path.lexists(path) else {}
