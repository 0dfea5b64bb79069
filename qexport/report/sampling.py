"""Under sampling: what a study measured of texts, as figures and sentences for the page of one of its exports."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..artifact.files import read_json
from ..artifact.manifest import MODEL_FILE
from ..errors import InputError
from ..sampling_study.result import Study, StudyRow
from .drawing import with_numbers
from .figures import Lines, Point, Series

_MOST_TOP_KS = 3


@dataclass(frozen=True)
class Sampled:
    """The section of a page.

    Attributes:
        intro: what was studied, which of its formats this export is, and what is not drawn.
        figures: for each top_k the same ones.
        conclusions: those that speak of this export, or all; others: the rest.
    """

    intro: tuple[str, ...]
    figures: tuple[Lines, ...]
    conclusions: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Measure:
    key: str
    title: str
    caption: str
    y_label: str
    field: str
    beside_float: bool  # whether the float model has a line of its own


_MEASURES = (
    _Measure("distance", "Distance from the float model", (
        "The least share of draws that differ, over the tokens of the float model's texts (total variation). At "
        "temperature 0 the share of tokens whose likeliest successor differs."
    ), "share of draws", "distance", False),
    _Measure("perplexity", "Perplexity of the texts", (
        "Under the float model, over that of the float model's own texts: above 1 it finds these texts less likely."
    ), "ratio", "perplexity_ratio", True),
    _Measure("repetition", "Repetition", "The share of 4-grams that were in the text before.", "share of 4-grams",
             "repetition", True),
)  # fmt: skip


def read_study(path: str | os.PathLike) -> Study:
    """The document that `qexport study -o` wrote.

    Raises:
        InputError: no such file, no study, or one of another version of qexport.
    """
    path, remedy = Path(path), "Give a file that `qexport study -o` wrote"
    if not path.is_file():
        raise InputError("no such file", place=str(path), remedy=remedy)
    whole = read_json(path)
    try:
        study = Study.model_validate(whole)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"not a study, damaged, or of another version of qexport ({at}: {first['msg']})",
            place=str(path),
            remedy=remedy,
        ) from None
    if not study.rows or not all(math.isfinite(row.temperature) for row in study.rows):
        raise InputError(
            "a study without rows, or with a temperature that is not a number", place=str(path), remedy=remedy
        )
    return study


def sampled(study: Study, folder: Path) -> Sampled:
    """A study on the page of the export in `folder`, whose own lines stand out; it need not be in the study."""
    own, why = _own(study, folder)
    longest = max(row.max_new_tokens for row in study.rows)
    rows = [row for row in study.rows if row.max_new_tokens == longest]
    top_ks = sorted({row.top_k for row in rows if row.temperature})
    figures = []
    for number, top_k in enumerate(top_ks[:_MOST_TOP_KS] or [0]):
        # The likeliest token is the same for every top_k.
        shown = [row for row in rows if row.top_k == top_k or not row.temperature]
        for measure in _MEASURES:
            title = f"{measure.title}, {f'top-k {top_k}' if top_k else 'top-k off'}" if top_ks else measure.title
            key = f"sampling_{measure.key}{f'_k{top_k}' if len(top_ks) > 1 else ''}"
            figures += with_numbers(Lines(
                key, title, "" if number else measure.caption, "temperature", measure.y_label,
                _series(measure, study, shown, own), from_zero=measure.field != "perplexity_ratio", counted=False,
                named=True,
            ))  # fmt: skip
    intro = [_studied(study, longest), why, _not_drawn(study, longest, top_ks[_MOST_TOP_KS:])]
    mine = [s for s in study.conclusions if own is None or _names(s, own)]
    others = [s for s in study.conclusions if s not in mine]
    return Sampled(tuple(filter(None, intro)), tuple(figures), tuple(mine), tuple(others))


def _own(study: Study, folder: Path) -> tuple[str | None, str]:
    """The name of the export's format in the study, and a sentence about it; None where the study does not have it."""
    place, exports = folder.resolve(), [f for f in study.formats[1:] if f.folder]
    # A folder may have been moved since, or made again as something else.
    found = [f for f in exports if Path(f.folder).resolve() == place]
    found = found or [f for f in exports if Path(f.folder).name == place.name]
    if not found:
        return None, "This export is not among its formats."
    size = sum(file.stat().st_size for file in place.glob(f"{MODEL_FILE}*") if file.is_file())
    same = next((f.name for f in found if f.model_bytes == size), None)
    if same is None:
        return None, f"Its {found[0].name} is a file of another size than this export's, so that no line stands out."
    return same, f"This export is {same}; its bars are standard errors."


def _studied(study: Study, longest: int) -> str:
    path = Path(study.reference)
    several = len(study.prompts) > 1
    prompts = f"{len(study.prompts)} prompts" if several else "one prompt"
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    return (
        f"Texts of up to {longest} new tokens that {path.name if path.is_absolute() else study.reference} and "
        f"{len(study.formats) - 1} exports of it wrote, from {prompts} with {seeds}; ± is a standard error over "
        f"{'prompts' if several else 'seeds'}."
    )


def _not_drawn(study: Study, longest: int, top_ks: list[int]) -> str:
    shorter = [str(n) for n in sorted(set(study.max_new_tokens)) if n != longest]
    parts = [f"texts of {' and '.join(shorter)} tokens"] if shorter else []
    parts += [f"top-k {', '.join(map(str, top_ks))}"] if top_ks else []
    return f"Measured too, and not drawn: {'; '.join(parts)}." if parts else ""


def _series(measure: _Measure, study: Study, rows: list[StudyRow], own: str | None) -> tuple[Series, ...]:
    """A line a format, the float model's last, so that the others look the same in every figure."""
    names = [format.name for format in study.formats[1:]]
    if measure.beside_float:
        names += [format.name for format in study.formats[:1]]
    found = [(name, _points(name, measure, rows)) for name in names]
    return tuple(Series(name, points, quiet=name != own) for name, points in found if points)


def _points(name: str, measure: _Measure, rows: list[StudyRow]) -> tuple[Point, ...]:
    points = []
    for row in sorted((row for row in rows if row.format == name), key=lambda row: row.temperature):
        value, error = getattr(row, measure.field), getattr(row, f"{measure.field}_error")
        said = "no number" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
        points.append(Point(row.temperature, value, f"{name} at {row.temperature:g}: {said}", error or 0.0))
    return tuple(points)


def _names(sentence: str, name: str) -> bool:
    """Whether a sentence speaks of a format, and not of another whose name goes on."""
    return re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", sentence) is not None
