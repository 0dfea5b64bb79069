"""The output folder: everything a runtime needs, appearing complete or not at all."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..artifact import manifest as manifests
from ..artifact.files import read_json
from ..artifact.manifest import Manifest
from ..artifact.tokenizer import write_tokenizer
from ..errors import InputError
from ..models.configs import CONFIG
from ..models.preflight import GENERATION, LEGAL_FILES, generation_config
from ..models.quantized import without_codes
from ..models.source import ModelFolder
from ..runtime.genai import genai_config

logger = logging.getLogger(__name__)

_READ = ("config.json", "generation_config.json")  # by the runtime
_COPIED = (*_READ, "preprocessor_config.json")


def write_companions(
    folder: Path, manifest: Manifest, source: ModelFolder | None, recipe_yaml: str, report: dict
) -> None:
    """Configs, tokenizer, licence, recipe, manifest and report beside the model."""
    manifests.save(manifest, folder)
    (folder / manifests.RECIPE_FILE).write_text(recipe_yaml, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if source is None:
        return
    copy_companions(folder, source, _COPIED)
    if manifest.kind == "decoder" and not manifests.is_part(manifest):
        (config, generation), end = configs_in(folder, _READ).values(), end_of_text(source)
        write_genai(folder, lambda: {manifests.GENAI_FILE: genai_config(manifest, config, generation, end)})


def write_companions_of_parts(
    folder: Path, source: ModelFolder, kind: str, parts: Iterable[str], names: Iterable[str], **more: Any
) -> None:
    """What belongs to all parts of an export: configs, tokenizer, licence, and a manifest that says what this is.

    Args:
        kind: of the whole; parts: names of their folders; names: of the configs; more: goes into the manifest.
    """
    about = {"format": manifests.FORMAT, "qexport": version("qexport"), "kind": kind, "parts": list(parts), **more}
    (folder / manifests.MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    copy_companions(folder, source, names)


def write_genai(folder: Path, contents: Callable[[], Mapping[str, Any]]) -> None:
    """What onnxruntime-genai needs to run an export, which is whole without it.

    Args:
        contents: makes what is in each file, by its name; its InputError says why there is none.
    """
    try:
        made = contents()
    except InputError as error:
        logger.warning("%s is left out: %s", manifests.GENAI_FILE, error)
        return
    for name, content in made.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def configs_in(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Configs by file name; those that are not there are empty."""
    return {name: read_json(folder / name) if (folder / name).is_file() else {} for name in names}


def end_of_text(source: ModelFolder) -> int | None:
    """The token that the tokenizer of a model ends texts with; None without one."""
    tokenizer = source.tokenizer()
    return None if tokenizer is None else tokenizer.eos_token_id


def _copy(source: ModelFolder, name: str, folder: Path) -> None:
    """A file of a model; a config without what it says of codes that the export has no more."""
    if name == CONFIG and source.codes is not None:
        said = without_codes(read_json(source.path / name))
        (folder / name).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source.path / name, folder / name)


def copy_companions(folder: Path, source: ModelFolder, names: Iterable[str]) -> None:
    """These files of a model, its licence and its tokenizer, as far as it has them."""
    for name in (*names, *LEGAL_FILES):
        if (source.path / name).is_file() and (name != GENERATION or generation_config(source.path)):
            _copy(source, name, folder)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        write_tokenizer(tokenizer, source.path, folder)
