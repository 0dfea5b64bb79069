"""Where a model comes from and under which licence, as far as its folder says so."""

from pathlib import Path
from typing import Any

from ..artifact.names import public_name
from ..errors import InputError
from .preflight import LEGAL_FILES, front_matter
from .source import ModelFolder

_KEYS = ("license", "license_name", "license_link")


def origin(folder: ModelFolder) -> dict[str, Any]:
    """The source of an export in plain types.

    Returns:
        name: of the model, without the folders above it on this machine; hub_id: its id on the Hugging Face Hub, null
        for a local model; licence: see `licence_of`.
    """
    local = Path(folder.name).exists()
    return {
        "name": public_name(folder.name),
        "hub_id": None if local else folder.name,
        "licence": licence_of(folder.path),
    }


def licence_of(path: Path) -> dict[str, str]:
    """What the front matter of README.md says, and the name of a licence file; nothing is guessed from its text.

    Returns:
        license, license_name, license_link as the Hub's model cards have them, and file; those that are there.
    """
    try:
        stated = front_matter(path / "README.md")
    except InputError:
        stated = {}  # which was said when the model was opened
    found = {key: value for key, value in stated.items() if key in _KEYS}
    found = {key: value for key, value in found.items() if isinstance(value, str) and value.strip()}
    files = [name for name in LEGAL_FILES[:-2] if (path / name).is_file()]
    return found | ({"file": files[0]} if files else {})
