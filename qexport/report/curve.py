"""KL against bytes on the page of an export that was chosen from a curve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..formatting import megabytes
from ..validation.formatting import number
from ..validation.report_store import checked
from .figures import Lines, Point, Series

KEY = "curve"


class _Point(BaseModel):
    bytes: int
    kl: float
    measured: bool
    schemes: dict[str, int]


class DrawnCurve(BaseModel):
    """What report.json keeps of a curve."""

    text: str
    points: tuple[_Point, ...]


def read_curve(whole: Mapping[str, Any], path: Path) -> DrawnCurve | None:
    """The curve in a report.json; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    return checked(DrawnCurve, whole[KEY], path) if whole.get(KEY) else None


def curve_figure(curve: DrawnCurve, size: int | None) -> Lines:
    """KL over megabytes, measured and estimated, and where this export is.

    Args:
        size: bytes of this export.
    """
    measured = [point for point in curve.points if point.measured]
    series = [Series("measured", tuple(map(_drawn, measured)))]
    series.append(Series("estimated", tuple(map(_drawn, curve.points)), quiet=True))
    here = min(measured, key=lambda point: abs(point.bytes - (size or 0)), default=None)
    if here is not None and size == here.bytes:
        series.append(Series("this export", (_drawn(here),)))
    caption = (
        "Mean KL from the float model when the schemes of all linears are chosen for a size, on a logarithmic scale. "
        f"Measured on {curve.text}; between, estimated from what each linear costs."
    )
    return Lines("curve", "KL against bytes", caption, "MB", "KL", tuple(series), log=True, counted=False)


def _drawn(point: _Point) -> Point:
    most = sorted(point.schemes.items(), key=lambda item: -item[1])[:3]
    schemes = ", ".join(f"{count} {name}" for name, count in most)
    how = "measured" if point.measured else "estimated"
    return Point(point.bytes / 1e6, point.kl, f"{megabytes(point.bytes)}: KL {number(point.kl)}, {how}; {schemes}")
