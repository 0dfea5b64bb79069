"""The recipes that come with the package, told without reading them as recipes: listing them needs no torch."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

from .reading import read_yaml


@dataclass(frozen=True)
class Wish:
    """What a user wants, and the preset for it.

    Attributes:
        name: of the wish; it names the preset too.
        preset: the file.
        size: of the model's file beside float16.
        speed: of prompts and of single tokens, or of whole runs, beside the float32 file in ONNX Runtime on a CPU.
        calibration: what text or data it needs.
    """

    name: str
    preset: str
    size: str
    speed: str
    calibration: str


_OWN_TEXT = "text of yours, or the model writes some"

# Measured by samples/results/presets.md; of encoders and CNNs by encoder.md and samples/vision.py.
WISHES = (
    Wish("smallest", "compact", "0.27", "0.8 to 1.2, 3 to 4.9", _OWN_TEXT),
    Wish("balanced", "balanced", "0.27 to 0.34", "0.8 to 1.1, 3 to 3.4", _OWN_TEXT),
    Wish("closest", "closest", "0.57", "1.3, 3.2", "none"),
    Wish("server", "server", "0.52", "1.6, 2.7", _OWN_TEXT),
    Wish("encoder", "encoder", "0.55", "2.0", "text of yours"),
    Wish("cnn", "w8a8_static", "0.54", "1.8", "inputs of yours"),
)
"""From the smallest to the closest, then by kind of use."""


def preset_files() -> dict[str, Any]:
    """The YAML file of every preset under its name, sorted by name."""
    files = sorted(resources.files("qexport.recipe").joinpath("presets").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def descriptions() -> dict[str, str]:
    """What every preset is under its name, sorted by name."""
    return {name: read_yaml(file.read_text("utf-8"), name)[0]["description"] for name, file in preset_files().items()}


def preset_of(name: str) -> str:
    """The preset that a name means: of a wish its own, else the name."""
    return next((wish.preset for wish in WISHES if wish.name == name), name)


def wishes() -> list[str]:
    """Their names, in order."""
    return [wish.name for wish in WISHES]
