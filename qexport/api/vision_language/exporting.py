"""Exporting a model of pictures and text: its three parts, each a folder of its own, in one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ...artifact.files import read_json
from ...artifact.manifest import EMBEDDING, FORMAT, GENAI_FILE, MANIFEST_FILE, PICTURE_PARTS, VISION_LANGUAGE, Manifest
from ...artifact.output import WorkFolder, claimed
from ...capture.vision_language import VisionParts, capture_vision_language
from ...errors import InputError
from ...models.source import ModelFolder
from ...progress import announce, of_part
from ...recipe.sections import TIED
from ...runtime.genai_pictures import PROCESSOR_FILE, pictures_config, pictures_processor
from ...validation.reader import check_reader
from ..folder import copy_companions
from ..parts import folder_of, recipes_of, whole_result
from ..refusals import check_applicable
from ..result import ExportResult
from ..stages import pipeline
from ..stages.calibrating import wants_data
from ..stages.capturing import capture
from ..stages.planning import plan
from ..stages.preparing import Preparation
from .sources import calibration_data, check_examples, load_examples

logger = logging.getLogger(__name__)

_CONFIGS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def export_pictures(prepared: Preparation, work: WorkFolder) -> ExportResult:
    """Export all parts of a model of pictures and text into one folder.

    Raises:
        QExportError: as `pipeline.run`; or an option that such models do not have.
    """
    check_applicable(VISION_LANGUAGE, prepared.options, prepared.recipe)
    folder, progress = folder_of(prepared), prepared.options.progress
    if prepared.asked or prepared.recipe.needs_calibration:
        check_examples(folder, prepared.recipe.calibration, prepared.data)
    announce(progress, "capture", "calibrate")
    for part in PICTURE_PARTS:
        announce(of_part(progress, part), *pipeline.stages(prepared.recipe))
    progress("capture", folder.name, 0, 1)
    parts = capture_vision_language(folder, prepared.options.placement)
    progress("capture", folder.name, 1, 1)
    asked = preparations(prepared, parts)
    planned = [plan(capture(part)) for part in asked.values()]
    for captured in parts.by_name.values():
        check_reader(captured)
    if prepared.asked or any(wants_data(part) for part in planned):
        told = partial(progress, "calibrate")
        examples = load_examples(parts, prepared.recipe.calibration, prepared.data, told)
        read = calibration_data(parts, examples, told)
        asked = {part: replace(own, data=read[part], asked=True) for part, own in asked.items()}
    made: dict[str, ExportResult] = {}
    with work.appearing() as temporary:
        for part, own in asked.items():
            with claimed(temporary / part, overwrite=False) as place:
                made[part] = pipeline.run(own, place)
        _write_companions(temporary, folder, parts)
        if parts.kind.genai is not None:
            written = {part: result.manifest for part, result in made.items()}
            _write_genai(temporary, folder, parts.kind.genai, written)
    return whole_result(VISION_LANGUAGE, made, work)


def preparations(prepared: Preparation, parts: VisionParts) -> dict[str, Preparation]:
    """By its name, what an export of each part works with."""
    recipes = recipes_of(parts.by_name, prepared.recipe)
    if prepared.recipe.embedding == TIED and _shares_table(parts):
        # Which are in two files, each with the codes that one of them would have for both.
        recipes[EMBEDDING] = recipes[EMBEDDING].model_copy(update={"embedding": prepared.recipe.lm_head})
    found = {}
    for part, captured in parts.by_name.items():
        own = replace(prepared.options, progress=of_part(prepared.options.progress, part))
        if captured.kind != "decoder":
            own = replace(own, attention="grouped", logits="all", max_length=None)
        found[part] = prepared.of_part(captured, recipes[part], own)
    return found


def _shares_table(parts: VisionParts) -> bool:
    """Whether the output projection is the table of embeddings."""
    read = {name for block in parts.decoder.blocks for name in block.parameters}
    read |= {alias for name in read for alias in parts.decoder.tied.get(name, ())}
    return any(name in read for block in parts.embedding.blocks for name in block.parameters)


def _write_genai(out: Path, source: ModelFolder, name: str, parts: Mapping[str, Manifest]) -> None:
    """What onnxruntime-genai needs to run the export, which is whole without it."""
    said = {file: read_json(out / file) if (out / file).is_file() else {} for file in _CONFIGS}
    processor = said["processor_config.json"].get("image_processor") or said["preprocessor_config.json"]
    tokenizer = source.tokenizer()
    end = None if tokenizer is None else tokenizer.eos_token_id
    try:
        contents = {
            GENAI_FILE: pictures_config(name, parts, said["config.json"], said["generation_config.json"], end),
            PROCESSOR_FILE: pictures_processor(processor),
        }  # fmt: skip
    except InputError as error:
        logger.warning("%s is left out: %s", GENAI_FILE, error)
        return
    for file, content in contents.items():
        (out / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_companions(out: Path, source: ModelFolder, parts: VisionParts) -> None:
    """What belongs to all parts: configs, tokenizer, licence, and a manifest that says what this is."""
    about = {
        "format": FORMAT, "qexport": version("qexport"), "kind": VISION_LANGUAGE, "parts": list(parts.by_name),
        "image_token_id": parts.kind.token(parts.config), **parts.kind.settings(parts.config),
    }  # fmt: skip
    (out / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    copy_companions(out, source, _CONFIGS)
