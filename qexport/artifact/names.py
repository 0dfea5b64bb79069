"""What files that travel call things that do not."""

import os
from pathlib import Path


def public_name(source: str | os.PathLike) -> str:
    """What to call a model or a text elsewhere: of a path its last part, as where it lay is nobody's business.

    Ids of the Hugging Face Hub, "self" and the like stay as they are.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    local = path.is_absolute() or text.startswith((".", "~")) or path.exists()
    return path.resolve().name if local else text
