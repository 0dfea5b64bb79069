"""KL against bytes: schemes chosen for sizes from the smallest to the closest, some of them exported and measured."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from ..formatting import megabytes
from ..mixed_precision.allocate import Allocation
from ..mixed_precision.curve import Curve, CurvePoint, estimated, sizes_between, spread_over
from ..recipe.recipe import Recipe
from ..validation.report_store import keep
from .trials import Trials

_SIZES, _MEASURED = 13, 6  # from 2 bits to 8 every half bit, of which so many are exported
FOLDER = "curve"


@dataclass(frozen=True)
class TracedCurve:
    """A curve, and the recipes of its points in the same order."""

    curve: Curve
    recipes: tuple[Recipe, ...]

    def keep(self, folder: Path) -> None:
        """Put it into an export: report.json gets the points, and a folder the recipes."""
        (folder / FOLDER).mkdir()
        for point, recipe in zip(self.curve.points, self.recipes, strict=True):
            (folder / point.recipe).write_text(recipe.to_yaml(), encoding="utf-8")
        keep(folder, "curve", self.curve.as_dict())


def trace(tried: Trials) -> TracedCurve:
    """Choose for every size, from the smallest one on, and export some; each export teaches the choices behind it.

    What was exported before is on the curve too.

    Raises:
        QExportError: as `Trials.attempt`.
    """
    chooser = tried.chooser
    before = {trial.allocation.picked for trial in tried.all}
    chosen: dict[tuple[str, ...], Allocation] = {trial.allocation.picked: trial.allocation for trial in tried.all}
    measured = spread_over(_SIZES, _MEASURED)
    for place in range(_SIZES):
        least, most = chooser.bytes(chooser.smallest()), chooser.bytes(chooser.best())
        allocation = chooser.within_bytes(sizes_between(least, most, _SIZES)[place])
        chosen.setdefault(allocation.picked, allocation)
        if place in measured and allocation.picked not in before:
            before.add(allocation.picked)
            trial = tried.attempt(allocation)
            if place < _SIZES - 1:
                tried.learn(trial)
    known = [(chooser.of_rounding(trial.allocation), trial.kl) for trial in tried.all]
    real = {trial.allocation.picked: (trial.bytes, trial.kl) for trial in tried.all}
    found = []
    for picked, allocation in chosen.items():
        guess = chooser.bytes(allocation), estimated(chooser.of_rounding(allocation), known)
        size, kl = real.get(picked, guess)
        counts = dict(Counter(chooser.schemes(allocation).values()))
        found.append((CurvePoint(size, kl, picked in real, counts), chooser.recipes(allocation)[0]))
    found.sort(key=lambda pair: pair[0].bytes)
    named = [
        replace(point, recipe=f"{FOLDER}/{i:02}_{megabytes(point.bytes).replace(' ', '')}.yaml")
        for i, (point, _) in enumerate(found)
    ]
    return TracedCurve(Curve(tuple(named), tried.described), tuple(recipe for _, recipe in found))
