"""Where a model comes from and under which licence, as far as its folder says so."""

from pathlib import Path
from typing import Any

import yaml

from .source import ModelFolder

# Files of a source model that have to travel with what is made of it.
LEGAL_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "NOTICE", "NOTICE.txt")
_KEYS = ("license", "license_name", "license_link")


def origin(folder: ModelFolder) -> dict[str, Any]:
    """The source of an export in plain types.

    Returns:
        name: of the model, without the folders above it on this machine; hub_id: its id on the Hugging Face Hub, null
        for a local model; licence: see `licence_of`.
    """
    local = Path(folder.name).exists()
    return {
        "name": Path(folder.name).resolve().name if local else folder.name,
        "hub_id": None if local else folder.name,
        "licence": licence_of(folder.path),
    }


def licence_of(path: Path) -> dict[str, str]:
    """What the front matter of README.md says, and the name of a licence file; nothing is guessed from its text.

    Returns:
        license, license_name, license_link as the Hub's model cards have them, and file; those that are there.
    """
    found = {key: value for key, value in _front_matter(path / "README.md").items() if key in _KEYS}
    found = {key: value for key, value in found.items() if isinstance(value, str) and value.strip()}
    files = [name for name in LEGAL_FILES[:-2] if (path / name).is_file()]
    return found | ({"file": files[0]} if files else {})


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of `---`; empty where there is none."""
    try:
        lines = card.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
