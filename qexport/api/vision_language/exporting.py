"""Exporting a model of pictures and text: its three parts, each a folder of its own, in one."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...artifact.manifest import EMBEDDING, GENAI_FILE, PICTURE_PARTS, VISION_LANGUAGE, Manifest
from ...artifact.output import PartFolder, WorkFolder
from ...capture.vision_language import VisionParts, capture_vision_language
from ...models.source import ModelFolder
from ...progress import announce, of_part
from ...recipe.sections import TIED
from ...runtime.genai_pictures import PROCESSOR_FILE, pictures_config, pictures_processor
from ...validation.reader import check_reader
from ..folder import configs_in, end_of_text, write_companions_of_parts, write_genai
from ..parts import folder_of, recipes_of, whole_result
from ..refusals import check_applicable
from ..result import ExportResult
from ..stages import pipeline
from ..stages.calibrating import wants_data
from ..stages.capturing import capture
from ..stages.planning import plan
from ..stages.preparing import Preparation
from .sources import calibration_data, check_examples, load_examples

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
    return write_parts(asked, parts, work)


def write_parts(asked: Mapping[str, Preparation], parts: VisionParts, work: WorkFolder) -> ExportResult:
    """Export all parts, each by what it works with, and write what belongs to the whole.

    Raises:
        QExportError: as `pipeline.run`.
    """
    made, folder = dict[str, ExportResult](), parts.decoder.origin
    with work.appearing() as temporary:
        for part, own in asked.items():
            made[part] = pipeline.run(own, PartFolder(work, temporary, part))
        write_companions_of_parts(
            temporary, folder, VISION_LANGUAGE, parts.by_name, _CONFIGS,
            image_token_id=parts.kind.token(parts.config), **parts.kind.settings(parts.config),
        )  # fmt: skip
        if parts.kind.genai is not None:
            written = {part: result.manifest for part, result in made.items()}
            write_genai(temporary, partial(_of_genai, temporary, folder, parts.kind.genai, written))
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


def _of_genai(out: Path, source: ModelFolder, name: str, parts: Mapping[str, Manifest]) -> dict[str, Any]:
    said, end = configs_in(out, _CONFIGS), end_of_text(source)
    processor = said["processor_config.json"].get("image_processor") or said["preprocessor_config.json"]
    return {
        GENAI_FILE: pictures_config(name, parts, said["config.json"], said["generation_config.json"], end),
        PROCESSOR_FILE: pictures_processor(processor),
    }
