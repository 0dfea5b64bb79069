"""Exports of a model of pictures and text that are made to be measured: one budget for its three files.

An error in the encoder of pictures costs what it does to the logits of texts about them: gradients of the decoder's
loss go on through the embedding, in which rows of features take the places of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ...artifact.manifest import DECODER, EMBEDDING, VISION, VISION_LANGUAGE
from ...artifact.output import WorkFolder
from ...calibrate.fisher import Importance
from ...capture.graph import CapturedModel
from ...capture.vision_language import VisionParts, capture_vision_language
from ...progress import Progress
from ...recipe.recipe import Recipe
from ...runtime.vision_language import open_vision_language
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
from .chain import carried_of, counted
from .exporting import preparations, write_parts
from .logits import About, about_pictures, logits_of
from .sources import Example, calibration_data, check_examples, float_feeds, load_examples
from .validating import judged_examples

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Pictures:
    """A model of pictures and text: its parts as they are and with passes over them behind, and what they run on.

    Attributes:
        asked: by part, what an export of it works with.
        captured: what is exported, changed by passes over the whole.
        feeds: by part, what costs are measured on.
        about, read: texts about pictures that KL is measured on, and what the float decoder reads of them.
    """

    parts: VisionParts
    asked: Mapping[str, Preparation]
    captured: Mapping[str, CapturedModel]
    feeds: Mapping[str, Sequence[Feeds]]
    about: About
    read: Sequence[Feeds]
    provider: str | None
    progress: Progress

    def export(self, recipes: Sequence[Recipe], work: WorkFolder) -> ExportResult:
        chosen = dict(zip(_ORDER, recipes, strict=True)) | {EMBEDDING: self.asked[EMBEDDING].recipe}
        asked = {part: replace(own, recipe=chosen[part], seconds={}) for part, own in self.asked.items()}
        return write_parts(asked, self.parts, work)

    def logits(self, made: ExportResult) -> Logits:
        longest = max(example.input_ids.shape[1] for example in self.about.examples)
        chain = open_vision_language(made.folder, provider=self.provider, max_length=longest)
        return logits_of(self.parts, chain, self.about, self.read, partial(self.progress, "logits"))

    def costs(self, made: ExportResult, importance: Mapping[str, Importance]) -> dict[str, float]:
        return costs_of_parts(made, self.captured, self.feeds, importance, self.provider, self.progress)


_ORDER = (DECODER, EMBEDDING, VISION)  # gradients go back; the embedding has a table alone, which stays as it is asked


@contextmanager
def trials_of_pictures(prepared: Preparation, judge: Judge, folder: Path, most: int | None = None) -> Iterator[Trials]:
    """Measure what schemes cost in every linear of a model of pictures and text, and get ready to try some.

    Args:
        folder: where exports are made.
        most: bytes of all files together; that they are too few is said before the work begins.

    Raises:
        InputError: there are no pictures with text, or so few bytes are not enough.
        RecipeError: the recipe quantizes activations, or nothing.
    """
    options, recipe, progress = prepared.options, prepared.recipe, prepared.options.progress
    check_applicable(VISION_LANGUAGE, options, recipe)
    check_examples(folder_of(prepared), recipe.calibration, prepared.data)
    parts = capture_vision_language(folder_of(prepared), options.placement)
    asked = preparations(prepared, parts)
    captured = {part: capture(own).captured for part, own in asked.items()}
    for part, whole in captured.items():
        parts.by_name[part].reader = check_reader(whole)  # not again for every export
    told = partial(progress, "calibrate")
    examples = load_examples(parts, recipe.calibration, prepared.data, told)
    read = calibration_data(parts, examples, told)
    asked = {part: replace(own, data=read[part], asked=True) for part, own in asked.items()}
    first = _first(examples.batches)
    feeds = {part: list(data.batches[: len(first)]) for part, data in read.items()}
    carried = carried_of(parts, first)
    chooser = chooser_of_parts(prepared, asked, captured, feeds, carried, _ORDER, most)
    judged = judged_examples(
        parts, ValidationOptions(text=judge.text, windows=judge.windows, window=judge.window), told
    )
    about, known = about_pictures(judged.batches), float_feeds(parts, judged.batches, told)[DECODER]
    model = _Pictures(parts, asked, captured, feeds, about, known, judge.provider, progress)
    yield Trials(chooser, judged.described, _model=model, _folder=folder)


def _first(examples: Sequence[Example]) -> list[Example]:
    """As many as costs are measured on."""
    found: list[Example] = []
    for example in examples:
        if sum(int(counted(before).sum()) for before in found) < TOKENS:
            found.append(example)
    return found
