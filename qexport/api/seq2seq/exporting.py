"""Exporting an encoder-decoder: its two parts, each a folder of its own, in one."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...artifact.manifest import DECODER, ENCODER, FORMAT, MANIFEST_FILE, SEQ2SEQ
from ...artifact.output import WorkFolder, claimed
from ...calibrate.data import Prepared, Progress, needs_data, no_progress, recipe_and_data
from ...capture.graph import CapturedModel
from ...capture.seq2seq import Parts, capture_seq2seq
from ...errors import RecipeError
from ...graph.convolution_sites import convolutions
from ...graph.sites import linears
from ...models.source import ModelFolder, open_model, source_path
from ...plan.model_plan import plan_for
from ...recipe.recipe import Recipe
from ...recipe.sections import FLOAT
from ...targets.base import target_for
from ...validation.reader import check_reader
from ..exporting import ExportResult, export, opened
from ..folder import copy_companions
from ..inspecting import Inspection, inspect
from .sources import load_sources, of_part, write_about

WRITTEN = 64  # tokens of a text that calibrates the decoder
_CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Seq2SeqResult:
    """What an export of an encoder-decoder wrote.

    Attributes:
        folder: the output folder.
        encoder, decoder: its parts, which are in folders of these names.
        kept: see `ExportResult`.
    """

    folder: Path
    encoder: ExportResult
    decoder: ExportResult
    kept: list[str] = field(default_factory=list)


def export_seq2seq(
    model: str | os.PathLike | ModelFolder,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    out_dir: str | os.PathLike,
    target: str = "cpu",
    dtype: str | None = None,
    calibration: Any = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Seq2SeqResult:
    """Quantize an encoder-decoder and write it as a folder with two exports.

    The folder "encoder" holds the encoder and what the decoder's layers make of its result, the folder "decoder" the
    rest with its cache. Where the recipe calibrates, the encoder reads the calibration sources, and the decoder texts
    that the float model writes about them. The whole float model is in memory.

    Args:
        model: a Hugging Face id or a folder.
        calibration: sources: as `export` takes them for models of text. For models of spectrograms a tensor of them, or
            the path of a safetensors file with one tensor.
        recipe, out_dir, target, dtype, overwrite, trust_remote_code, progress: as `export` takes them. The overrides of
            a recipe match linears of both parts.

    Raises:
        QExportError: one of its kinds says what is wrong, where, and what to do.
    """
    out = Path(out_dir)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    width = target_for(target, recipe, dtype).dtype.itemsize
    alone = [method.key for method in recipe.methods if method.needs_grouped_attention]
    alone += ["prefill"] if recipe.prefill is not None else []
    if alone:
        raise RecipeError(f"{alone[0]} is for decoders alone", place=alone[0], remedy="Remove it for encoder-decoders")
    with claimed(out, overwrite, source_path(model)) as work:
        return _export(work, model, recipe, width, target, dtype, calibration, trust_remote_code, progress)


def _export(
    work: WorkFolder, model, recipe: Recipe, width: int, target: str, dtype: str | None, calibration,
    trust_remote_code: bool, progress: Progress,
) -> Seq2SeqResult:  # fmt: skip
    recipe, data = recipe_and_data(recipe, calibration)
    folder = opened(model, trust_remote_code=trust_remote_code)
    progress("capture", folder.name, 0, 1)
    parts = capture_seq2seq(folder)
    recipes = part_recipes(parts, recipe)
    read: dict[str, Prepared | None] = {ENCODER: None, DECODER: None}
    plans = {part: plan_for(captured, recipes[part], width)[0] for part, captured in _named(parts).items()}
    for captured in _named(parts).values():
        check_reader(captured)
    if calibration is not None or any(needs_data(recipes[part], plan) for part, plan in plans.items()):
        sources = load_sources(parts, recipe.calibration, data)
        progress("calibrate", "the model writes about its sources", 0, 1)
        written = write_about(parts, sources, WRITTEN, seed=recipe.calibration.seed)
        progress("calibrate", "the model writes about its sources", 1, 1)
        read = {ENCODER: Prepared(sources.batches, sources.described), DECODER: written}
    with work.appearing() as temporary:
        made = {
            part: export(
                captured, recipes[part], out_dir=temporary / part, target=target, dtype=dtype, calibration=read[part],
                progress=partial(of_part, progress, part),
            )
            for part, captured in _named(parts).items()
        }  # fmt: skip
        _write_companions(temporary, folder)
    found = {part: replace(result, folder=work.given / part) for part, result in made.items()}
    return Seq2SeqResult(work.given, found[ENCODER], found[DECODER], work.kept)


@dataclass(frozen=True)
class Parted:
    """What an export of an encoder-decoder would do to each part."""

    encoder: Inspection
    decoder: Inspection

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {ENCODER: self.encoder.as_dict(), DECODER: self.decoder.as_dict()}


def inspect_seq2seq(
    model: str | os.PathLike | ModelFolder,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    target: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Parted:
    """Say what `export_seq2seq` would do with the same arguments; raises as it does."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    folder = open_model(model, trust_remote_code=trust_remote_code)
    parts = capture_seq2seq(folder)
    recipes = part_recipes(parts, recipe)
    found = {
        part: inspect(captured, recipes[part], target=target, dtype=dtype) for part, captured in _named(parts).items()
    }
    return Parted(found[ENCODER], found[DECODER])


def part_recipes(parts: Parts, recipe: Recipe) -> dict[str, Recipe]:
    """The recipe for each part: overrides that match in it, and no embedding where it reads no tokens.

    Raises:
        RecipeError: an override matches no linear of either.
    """
    names = {part: _names(captured) for part, captured in _named(parts).items()}
    idle = recipe.unmatched_overrides([*names[ENCODER], *names[DECODER]])
    if idle:
        raise RecipeError(f"matches no linear or convolution of the model: {idle[0]!r}", place="overrides")
    found = {}
    for part, captured in _named(parts).items():
        elsewhere = set(recipe.unmatched_overrides(names[part]))
        overrides = tuple(override for override in recipe.overrides if override.match not in elsewhere)
        reads = any(port.name == "input_ids" for port in captured.inputs)
        embedding = {} if reads else {"embedding": FLOAT}
        found[part] = recipe.model_copy(update={"overrides": overrides, **embedding})
    return found


def _named(parts: Parts) -> dict[str, CapturedModel]:
    return {ENCODER: parts.encoder, DECODER: parts.decoder}


def _names(captured: CapturedModel) -> Sequence[str]:
    graphs = [block.module.graph for block in captured.blocks]
    found = [linear.name for graph in graphs for linear in linears(graph)]
    return [*found, *(name for graph in graphs for name in convolutions(graph))]


def _write_companions(out: Path, source: ModelFolder) -> None:
    """What belongs to both parts: configs, tokenizer, licence, and a manifest that says what this is."""
    about = {"format": FORMAT, "qexport": version("qexport"), "kind": SEQ2SEQ, "parts": [ENCODER, DECODER]}
    (out / MANIFEST_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    copy_companions(out, source, _CONFIGS)
