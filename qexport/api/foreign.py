"""Comparing a file that qexport did not write with the float model it is of."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..artifact.manifest import CPU, Kind, Manifest
from ..artifact.scratch import scratch_folder
from ..errors import InputError, writing_to
from ..progress import announce
from ..validation.foreign import ForeignFile, describe, find_file
from ..validation.report import Report
from .measuring import (
    FloatModel,
    Laps,
    Subject,
    captured_for,
    check_writable,
    checked_reader,
    compared,
    read_by,
    stages,
    told,
    write_report,
)
from .options import ValidationOptions


def validate_foreign(place: Path, reference: FloatModel, options: ValidationOptions) -> Report:
    """Compare a file of another tool with the float model; see `validate`, for its errors too.

    Its folder gets report.json and report.html, or the folder of the options does, and nothing else is written.
    """
    file = find_file(place)
    out = options.out or file.path.parent
    _check(reference, options)
    with writing_to(out, "Free some space"):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out)  # before the work
    with scratch_folder() as folder:
        report, manifest = _report(file, folder, reference, options)
    write_report(report, manifest, out)
    return report


def _check(reference: FloatModel, options: ValidationOptions) -> None:
    asked = {"references": options.references, "sensitivity": options.sensitivity}
    if wrong := [name for name, value in asked.items() if value]:
        raise InputError("is only for exports of qexport", place=wrong[0], remedy="Leave it out")
    if isinstance(reference, torch.nn.Module) and options.gates.asked:
        raise InputError("limits are for language models, and this model predicts no next token", place="gates")


def _report(
    file: ForeignFile, folder: Path, reference: FloatModel, options: ValidationOptions
) -> tuple[Report, Manifest]:
    laps = Laps()
    kind: Kind = "module" if isinstance(reference, torch.nn.Module) else "decoder"
    announce(options.progress, *stages(kind, options, foreign=True))
    captured = captured_for(reference, Manifest(target="cpu", kind=kind, provider=CPU), options)
    laps.lap("capture")
    checked = checked_reader(captured, options)
    laps.lap("check")
    read = read_by(captured, options)
    laps.lap("text")
    described = describe(
        file, captured, folder, read.feeds, provider=options.provider, threads=options.threads,
        progress=partial(options.progress, "matching"),
    )  # fmt: skip
    laps.lap("matching")
    subject = Subject(
        folder, described.manifest, captured, described.factors, replace(options, provider=None), described
    )
    report = told(compared(subject, read, laps), captured, reference, checked, options)
    return report, described.manifest
