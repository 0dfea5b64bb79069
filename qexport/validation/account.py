"""What an export did to the weights, by its own account."""

from pathlib import Path

from ..errors import InputError
from .report_store import account


def transforms(folder: Path) -> bool:
    """Whether any pass that changed something did not promise to keep values; unknown counts as yes.

    So does training of the whole model, which moves norms.
    """
    try:
        export = account(folder)
    except InputError:
        return True
    if export.passes is None or export.tuned.get("step"):
        return True
    kept = {step.name for step in export.passes if step.keeps_values}
    return any(name not in kept for block in export.blocks for name in block.changed)
