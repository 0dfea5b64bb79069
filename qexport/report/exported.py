"""An exported folder as its readers need it: manifest, recipe, and what export and validation reported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..artifact import manifest as manifests
from ..artifact.checksums import MANIFEST_FILE
from ..artifact.files import read_json
from ..artifact.manifest import RECIPE_FILE, Manifest
from ..errors import InputError, RecipeError
from ..recipe.reading import read_yaml
from ..validation.report import Report
from ..validation.report_store import KEY, REPORT_FILE, checked, keep
from .curve import DrawnCurve, read_curve
from .speed import Speed, read_speed
from .tasks import TaskScore, task_scores

_FOREIGN = "foreign"  # key of report.json for the manifest of a file that has none


@dataclass(frozen=True)
class Exported:
    """What a folder says about itself.

    Attributes:
        manifest: what is in the folder.
        recipe: recipe.yaml as text; empty where there is none.
        export: the key "export" of report.json; empty where there is none.
        report: the validation; None where there was none.
        speed: as `qexport bench` measured it; None where nobody did.
        tasks: scores of lm-eval that lie in the folder.
        curve: KL against bytes, of an export whose schemes were chosen from it.
    """

    folder: Path
    manifest: Manifest
    recipe: str
    export: Mapping[str, Any]
    report: Report | None
    speed: Speed | None = None
    tasks: tuple[TaskScore, ...] = ()
    curve: DrawnCurve | None = None

    @property
    def validation(self) -> Report:
        """What validation found.

        Raises:
            InputError: there was none.
        """
        if self.report is None:
            raise InputError(
                "was never validated, so there is nothing to show", place=str(self.folder),
                remedy=f"Run qexport validate {self.folder} --reference MODEL",
            )  # fmt: skip
        return self.report

    @property
    def source(self) -> Mapping[str, Any]:
        """What the export knows of the float model: name, hub_id, licence."""
        found = self.export.get("source")
        return found if isinstance(found, Mapping) else {}

    @property
    def model(self) -> str:
        """Name of the float model without the folders of the machine it was on."""
        name = str(self.source.get("hub_id") or self.source.get("name") or "")
        if not name and self.report is not None:
            path = Path(self.report.reference)
            name = path.name if path.is_absolute() else self.report.reference
        return name or self.folder.resolve().name

    @property
    def recipe_name(self) -> str:
        """Name of the recipe, or its scheme."""
        settings = recipe_settings(self.recipe)
        return str(settings.get("name") or settings.get("scheme") or "")


@lru_cache(maxsize=8)  # a page and a card ask for several of them
def recipe_settings(text: str) -> Mapping[str, Any]:
    """The keys of a recipe; none where the text is no YAML mapping."""
    try:
        return read_yaml(text, RECIPE_FILE)[0]
    except RecipeError:
        return {}


def read_export(folder: str | os.PathLike[str]) -> Exported:
    """Read an exported folder.

    Raises:
        InputError: no export, or a report.json that is damaged or of another version of qexport.
    """
    folder = Path(folder)
    path, recipe = folder / REPORT_FILE, folder / RECIPE_FILE
    whole = read_json(path) if path.is_file() else {}
    foreign = whole.get(_FOREIGN) if not (folder / MANIFEST_FILE).is_file() else None
    manifest = manifests.load(folder) if foreign is None else checked(Manifest, foreign, path)
    export, report = whole.get("export"), whole.get(KEY)
    try:
        found = None if report is None else Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"its validation is damaged or of another version of qexport ({at}: {first['msg']})", place=str(path),
            remedy=f"Run qexport validate {folder} --reference MODEL again",
        ) from None  # fmt: skip
    return Exported(
        folder, manifest, recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        export if isinstance(export, Mapping) else {}, found, read_speed(whole, folder), task_scores(folder),
        read_curve(whole, path),
    )  # fmt: skip


def describe_foreign(folder: Path, manifest: Manifest) -> None:
    """Keep in a folder's report.json what the file is that qexport did not write, for `read_export`."""
    keep(folder, _FOREIGN, manifest.model_dump(mode="json"))


def read_validated(folder: str | os.PathLike[str]) -> Exported:
    """The same of a folder that was validated.

    Raises:
        InputError: as `read_export`, or no validation.
    """
    found = read_export(folder)
    _ = found.validation
    return found
