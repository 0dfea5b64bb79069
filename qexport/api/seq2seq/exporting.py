"""Exporting an encoder-decoder: its two parts, each a folder of its own, in one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ...artifact.files import read_json
from ...artifact.manifest import DECODER, ENCODER, FORMAT, GENAI_FILE, MANIFEST_FILE, SEQ2SEQ, Manifest, stated
from ...artifact.output import PartFolder, WorkFolder
from ...calibrate.data import Prepared
from ...capture.graph import CapturedModel
from ...capture.seq2seq import Parts, capture_seq2seq
from ...errors import InputError
from ...models.source import ModelFolder
from ...progress import announce, of_part
from ...runtime import genai_speech
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
from .sources import check_sources, load_sources, write_about

logger = logging.getLogger(__name__)

WRITTEN = 64  # tokens of a text that calibrates the decoder
_CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def export_parts(prepared: Preparation, work: WorkFolder) -> ExportResult:
    """Export both parts of an encoder-decoder into one folder.

    Raises:
        QExportError: as `pipeline.run`; or an option that encoder-decoders do not have.
    """
    check_applicable(SEQ2SEQ, prepared.options, prepared.recipe)
    folder = folder_of(prepared)
    progress = prepared.options.progress
    announce(progress, "capture", "calibrate")
    for part in (ENCODER, DECODER):
        announce(of_part(progress, part), *pipeline.stages(prepared.recipe))
    progress("capture", folder.name, 0, 1)
    parts = capture_seq2seq(folder, prepared.options.placement)
    progress("capture", folder.name, 1, 1)
    asked = preparations(prepared, parts)
    planned = [plan(capture(part)) for part in asked.values()]
    wanted_data = prepared.asked or any(wants_data(part) for part in planned)
    if wanted_data:
        check_sources(parts, prepared.recipe.calibration, prepared.data)
    for captured in by_name(parts).values():
        check_reader(captured)
    if wanted_data:
        asked = _with_data(asked, parts, prepared)
    made: dict[str, ExportResult] = {}
    with work.appearing() as temporary:
        for part, own in asked.items():
            made[part] = pipeline.run(own, PartFolder(work, temporary, part))
        _write_companions(temporary, folder, {part: result.manifest for part, result in made.items()})
    return whole_result(SEQ2SEQ, made, work)


def preparations(prepared: Preparation, parts: Parts) -> dict[str, Preparation]:
    """By its name, what an export of each part works with."""
    recipes = recipes_of(by_name(parts), prepared.recipe)
    return {
        part: prepared.of_part(
            captured, recipes[part],
            replace(prepared.options, progress=of_part(prepared.options.progress, part)),
        )
        for part, captured in by_name(parts).items()
    }  # fmt: skip


def by_name(parts: Parts) -> dict[str, CapturedModel]:
    """Both parts, by the names of their folders."""
    return {ENCODER: parts.encoder, DECODER: parts.decoder}


def _with_data(asked: Mapping[str, Preparation], parts: Parts, prepared: Preparation) -> dict[str, Preparation]:
    """The same with sources for the encoder, and texts about them for the decoder, that the float model writes."""
    recipe, progress = prepared.recipe, prepared.options.progress
    sources = load_sources(parts, recipe.calibration, prepared.data)
    progress("calibrate", "the model writes about its sources", 0, 1)
    written = write_about(parts, sources, WRITTEN, seed=recipe.calibration.seed)
    progress("calibrate", "the model writes about its sources", 1, 1)
    read = {ENCODER: Prepared(sources.batches, sources.described), DECODER: written}
    return {part: replace(own, data=read[part], asked=True) for part, own in asked.items()}


def _write_companions(out: Path, source: ModelFolder, parts: Mapping[str, Manifest]) -> None:
    """What belongs to both parts: configs, tokenizer, licence, a manifest that says what this is, and genai's files."""
    about = {"format": FORMAT, "qexport": version("qexport"), "kind": SEQ2SEQ, "parts": [ENCODER, DECODER]}
    (out / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    copy_companions(out, source, _CONFIGS)
    if source.config.model_type not in genai_speech.KINDS:
        return
    config, sound = (read_json(out / n) if (out / n).is_file() else {} for n in ("config.json", _CONFIGS[2]))
    try:
        found = genai_speech.genai_config(parts, config, stated(out))
    except InputError as error:
        logger.warning("%s is left out: %s", GENAI_FILE, error)
        return
    for name, contents in ((GENAI_FILE, found), (genai_speech.AUDIO_FILE, genai_speech.audio_config(sound))):
        (out / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
