"""Execution providers by the names that people and ONNX Runtime give them, and why one is not there."""

import onnxruntime as ort

from ..artifact.manifest import Manifest
from ..errors import InputError
from .doctor import check_provider

_SUFFIX = "ExecutionProvider"


def provider_named(name: str) -> str:
    """ONNX Runtime's name of a provider that may be called without its ending, in capitals or not: cpu, cuda.

    Raises:
        InputError: no ONNX Runtime has such a provider.
    """
    known = {full.removesuffix(_SUFFIX).lower(): full for full in ort.get_all_providers()}
    found = known.get(name.lower().removesuffix(_SUFFIX.lower()))
    if found is None:
        short = [full.removesuffix(_SUFFIX).lower() for full in ort.get_available_providers()]
        raise InputError(
            f"there is no execution provider called {name!r}", remedy=f"Available: {', '.join(sorted(short))}"
        )
    return found


def chosen_provider(name: str | None, manifest: Manifest) -> str:
    """The provider to run on: the one that is named, else the one the file was made for; raises as `provider_named`."""
    return manifest.provider if name is None else provider_named(name)


def device_of(session: ort.InferenceSession) -> str:
    """Where a session reads and writes: "cpu", or the memory of its device in the word that ONNX Runtime binds by."""
    places = [*session.get_input_memory_infos(), *session.get_output_memory_infos()]
    return next((name for place in places if (name := place.name.lower()) != "cpu"), "cpu")


def why_missing(provider: str) -> str:
    """Why a provider does not run here: it is not in this package, or which of its libraries does not load."""
    if provider not in ort.get_available_providers():
        return "this onnxruntime package was built without it"
    check = check_provider(provider)
    return "it takes other models, and not this one" if check.ok else check.detail
