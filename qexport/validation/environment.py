"""Under which circumstances a validation ran: what it takes to run it again."""

import os
import platform
from importlib.metadata import version
from typing import Any

import onnxruntime
import torch
import transformers

from ..artifact.names import public_name


def versions() -> dict[str, str]:
    """Of qexport and of what computes: the float model in PyTorch, the deployed one in ONNX Runtime."""
    return {
        "qexport": version("qexport"), "onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__),
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def settings(reference: Any, text: str | os.PathLike | None, **others: Any) -> dict[str, Any]:
    """The arguments of `validate` in plain types, under the names of the command line's options.

    Args:
        reference: null for a model that is no file; text: a text given itself is not kept, `Report.text` describes it.
            Of paths the last part is kept.
        others: plain types already.
    """
    named = isinstance(reference, (str, os.PathLike))
    told = "TEXT" if text else None
    if text is not None and os.path.isfile(os.path.expanduser(text)):
        told = public_name(text)
    return {
        "reference": public_name(reference) if named else None,
        "text": told, **others,
    }  # fmt: skip
