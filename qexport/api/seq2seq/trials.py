"""Exports of an encoder-decoder that are made to be measured: one budget for both files.

An error in the encoder costs what it does to the logits of texts that are written about a source: gradients of the
decoder's loss go on through what its cross-attention reads, which is what the encoder's file makes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ...artifact.manifest import DECODER, ENCODER, SEQ2SEQ
from ...artifact.output import WorkFolder
from ...calibrate.data import Prepared
from ...calibrate.fisher import Carried, Importance
from ...capture.graph import CapturedModel
from ...capture.seq2seq import Parts, capture_seq2seq
from ...models.source import ModelFolder
from ...progress import Progress
from ...recipe.recipe import Recipe
from ...runtime.seq2seq import open_seq2seq
from ...validation.reader import check_reader
from ...validation.report import Logits
from ..options import ValidationOptions
from ..parts import folder_of
from ..refusals import check_applicable
from ..result import ExportResult
from ..stages.capturing import capture
from ..stages.preparing import Preparation
from ..trial_parts import chooser_of_parts, costs_of_parts
from ..trials import TOKENS, Judge, Trials
from .exporting import WRITTEN, by_name, preparations, write_parts
from .logits import logits_of
from .sources import Sources, check_sources, load_sources, write_about
from .validating import sources_of


@dataclass(frozen=True)
class _Pair:
    """An encoder-decoder: both parts as they are and with passes over them behind, and what they are measured on.

    Attributes:
        asked: by part, what an export of it works with.
        captured: what is exported, changed by passes over the whole.
        feeds: by part, what costs are measured on.
        read, written: sources, and what the float model writes about them, that KL is measured on.
    """

    folder: ModelFolder
    parts: Parts
    asked: Mapping[str, Preparation]
    captured: Mapping[str, CapturedModel]
    feeds: Mapping[str, Sequence[Mapping[str, Tensor]]]
    read: Sequence[dict[str, Tensor]]
    written: Prepared
    provider: str | None
    progress: Progress

    def export(self, recipes: Sequence[Recipe], work: WorkFolder) -> ExportResult:
        chosen = dict(zip(_ORDER, recipes, strict=True))
        asked = {part: replace(own, recipe=chosen[part], seconds={}) for part, own in self.asked.items()}
        return write_parts(asked, self.folder, work)

    def logits(self, made: ExportResult) -> Logits:
        pair = open_seq2seq(made.folder, provider=self.provider)
        return logits_of(self.parts, pair, self.read, self.written, partial(self.progress, "logits"))

    def costs(self, made: ExportResult, importance: Mapping[str, Importance]) -> dict[str, float]:
        return costs_of_parts(made, self.captured, self.feeds, importance, self.provider, self.progress)


_ORDER = (DECODER, ENCODER)  # gradients go back


@contextmanager
def trials_of_parts(prepared: Preparation, judge: Judge, folder: Path, most: int | None = None) -> Iterator[Trials]:
    """Measure what schemes cost in every linear of an encoder-decoder, and get ready to try some.

    Args:
        folder: where exports are made.
        most: bytes of both files together; that they are too few is said before the work begins.

    Raises:
        InputError: there are no sources, or so few bytes are not enough.
        RecipeError: the recipe quantizes activations, or nothing.
    """
    options, recipe, progress = prepared.options, prepared.recipe, prepared.options.progress
    check_applicable(SEQ2SEQ, options, recipe)
    source = folder_of(prepared)
    parts = capture_seq2seq(source, options.placement)
    check_sources(parts, recipe.calibration, prepared.data)
    asked = preparations(prepared, parts)
    captured = {part: capture(own).captured for part, own in asked.items()}
    for part, whole in captured.items():
        by_name(parts)[part].reader = check_reader(whole)  # not again for every export
    sources = load_sources(parts, recipe.calibration, prepared.data)
    written = write_about(parts, sources, WRITTEN, seed=recipe.calibration.seed)
    read = {ENCODER: Prepared(sources.batches[: len(written.batches)], sources.described), DECODER: written}
    asked = {part: replace(own, data=read[part], asked=True) for part, own in asked.items()}
    feeds = _feeds(sources, written)
    carried = Carried(
        frozenset(port.name for port in parts.encoder.outputs), sum(b["input_ids"].numel() for b in feeds[DECODER])
    )
    chooser = chooser_of_parts(prepared, asked, captured, feeds, carried, _ORDER, most)
    judged = sources_of(parts, ValidationOptions(text=judge.text, windows=judge.windows, window=judge.window))
    about = write_about(parts, judged, WRITTEN)
    model = _Pair(
        source, parts, asked, captured, feeds, judged.batches[: len(about.batches)], about, judge.provider, progress
    )
    yield Trials(chooser, about.described, _model=model, _folder=folder)


def _feeds(sources: Sources, written: Prepared) -> dict[str, list[Mapping[str, Tensor]]]:
    """As many sources and texts as costs are measured on."""
    found: dict[str, list[Mapping[str, Tensor]]] = {ENCODER: [], DECODER: []}
    for source, text in zip(sources.batches, written.batches, strict=False):
        if sum(batch["input_ids"].numel() for batch in found[DECODER]) < TOKENS:
            found[ENCODER].append(source)
            found[DECODER].append(text)
    return found
