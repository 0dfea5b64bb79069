"""Folders of adapters (LoRA and its like), which are no models, and models with an adapter beside them."""

import json
from pathlib import Path

from ..errors import InputError

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MERGE = "Name its base as the model and its folder with --adapter"


def check_adapter(folder: Path, name: str) -> None:
    """Refuse an adapter, alone or beside its base: an export would leave it out.

    Args:
        name: what the user calls the model.

    Raises:
        InputError: there is one; the sentence names its base.
    """
    found = [file for file in (_CONFIG, *_WEIGHTS) if (folder / file).is_file()]
    if not found:
        return
    kind, base = _described(folder / _CONFIG)
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*")):
        raise InputError(
            f"has {kind} beside its weights ({found[0]}), which an export would leave out", place=name,
            remedy=f"Merge it with --adapter {name}; or move {' and '.join(found)} elsewhere to export without it",
        )  # fmt: skip
    raise InputError(f"holds {kind} of {base}, not a whole model", place=name, remedy=_MERGE)


def _described(config: Path) -> tuple[str, str]:
    """What kind of adapter it is, and the model that it belongs to."""
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
        said = said if isinstance(said, dict) else {}
    except (OSError, ValueError, RecursionError):
        said = {}
    kind, base = said.get("peft_type"), said.get("base_model_name_or_path")
    return f"an adapter ({kind})" if isinstance(kind, str) else "an adapter", str(base or "an unnamed base")
