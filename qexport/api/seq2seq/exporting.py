"""Exporting an encoder-decoder: its two parts, each a folder of its own, in one."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...artifact.manifest import DECODER, ENCODER, GENAI_FILE, SEQ2SEQ, Manifest, stated
from ...artifact.output import PartFolder, WorkFolder
from ...calibrate.data import Prepared
from ...capture.graph import CapturedModel
from ...capture.seq2seq import Parts, capture_seq2seq
from ...models.source import ModelFolder
from ...progress import announce, of_part
from ...runtime import genai_speech
from ...validation.reader import check_reader
from ..folder import configs_in, write_companions_of_parts, write_genai
from ..parts import folder_of, recipes_of, whole_result
from ..refusals import check_applicable
from ..result import ExportResult
from ..stages import pipeline
from ..stages.calibrating import wants_data
from ..stages.capturing import capture
from ..stages.planning import plan
from ..stages.preparing import Preparation
from .sources import check_sources, load_sources, write_about

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
        asked = with_data(asked, parts, prepared)
    return write_parts(asked, folder, work)


def write_parts(asked: Mapping[str, Preparation], folder: ModelFolder, work: WorkFolder) -> ExportResult:
    """Export both parts, each by what it works with, and write what belongs to the whole.

    Raises:
        QExportError: as `pipeline.run`.
    """
    made: dict[str, ExportResult] = {}
    with work.appearing() as temporary:
        for part, own in asked.items():
            made[part] = pipeline.run(own, PartFolder(work, temporary, part))
        write_companions_of_parts(temporary, folder, SEQ2SEQ, made, _CONFIGS)
        if folder.config.model_type in genai_speech.KINDS:
            write_genai(temporary, partial(_of_genai, temporary, {part: r.manifest for part, r in made.items()}))
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


def with_data(asked: Mapping[str, Preparation], parts: Parts, prepared: Preparation) -> dict[str, Preparation]:
    """The same with sources for the encoder, and texts about them for the decoder, that the float model writes."""
    recipe, progress = prepared.recipe, prepared.options.progress
    sources = load_sources(parts, recipe.calibration, prepared.data)
    progress("calibrate", "the model writes about its sources", 0, 1)
    written = write_about(parts, sources, WRITTEN, seed=recipe.calibration.seed)
    progress("calibrate", "the model writes about its sources", 1, 1)
    read = {ENCODER: Prepared(sources.batches, sources.described), DECODER: written}
    return {part: replace(own, data=read[part], asked=True) for part, own in asked.items()}


def _of_genai(out: Path, parts: Mapping[str, Manifest]) -> dict[str, Any]:
    said = configs_in(out, _CONFIGS)
    return {
        GENAI_FILE: genai_speech.genai_config(parts, said["config.json"], stated(out)),
        genai_speech.AUDIO_FILE: genai_speech.audio_config(said["preprocessor_config.json"]),
    }
