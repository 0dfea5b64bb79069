"""The output folder: everything a runtime needs, appearing complete or not at all."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

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
        _write_genai(folder, manifest, source)


def _write_genai(folder: Path, manifest: Manifest, source: ModelFolder) -> None:
    """What onnxruntime-genai needs to run the export, which is whole without it."""
    config, generation = (read_json(folder / n) if (folder / n).exists() else {} for n in _READ)
    tokenizer = source.tokenizer()
    end = None if tokenizer is None else tokenizer.eos_token_id
    try:
        contents = genai_config(manifest, config, generation, end)
    except InputError as error:
        logger.warning("%s is left out: %s", manifests.GENAI_FILE, error)
    else:
        (folder / manifests.GENAI_FILE).write_text(json.dumps(contents, indent=2) + "\n")


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
