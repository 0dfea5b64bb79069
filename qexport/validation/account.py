"""What an export did to the weights, by its own account."""

from pathlib import Path

from ..artifact.files import read_json
from ..errors import InputError
from .report_store import REPORT_FILE


def transforms(folder: Path) -> bool:
    """Whether any pass that changed something did not promise to keep values; unknown counts as yes.

    So does training of the whole model, which moves norms.
    """
    try:
        export = read_json(folder / REPORT_FILE)["export"]
        if export.get("tuned", {}).get("step"):
            return True
        promises = {step["name"]: step["keeps_values"] for step in export["passes"]}
        return not all(promises[name] for block in export["blocks"] for name in block["changed"])
    except (InputError, KeyError, TypeError, AttributeError):
        return True
