"""Exports that are made to be measured: what schemes cost, and exports that are compared with the model."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..artifact.output import WorkFolder, claimed
from ..calibrate.block_activations import Feeds, decoder_inputs
from ..calibrate.data import calibration_batches
from ..calibrate.fisher import Importance
from ..calibrate.projection import FloatFindings
from ..capture.graph import CapturedModel
from ..device import CPU
from ..errors import InputError, QExportError
from ..mixed_precision.allocate import Allocation
from ..mixed_precision.allocator import PricedModel, SchemeAllocator
from ..mixed_precision.caches import CountedCache, numbers_a_token
from ..models.source import ModelFolder
from ..progress import Progress
from ..recipe.methods import CacheMethod
from ..recipe.recipe import Recipe
from ..recipe.registry import methods
from ..targets.base import Target
from ..validation.account import transforms
from ..validation.kl_costs import deployed_costs
from ..validation.logits import compare_logits, deployed_logits
from ..validation.reader import check_reader
from ..validation.reference import FloatOutputs, decoder_feeds
from ..validation.report import Logits
from ..validation.text import choose_text
from .refusals import check_cache
from .result import ExportResult
from .stages import pipeline
from .stages.capturing import capture, capture_model
from .stages.preparing import Preparation

logger = logging.getLogger(__name__)

TOKENS, _LENGTH = 1024, 512  # on which costs are measured, and tokens of a sequence at most


@dataclass(frozen=True)
class Judge:
    """What the KL of exports is measured on, see `export_auto`."""

    text: str | os.PathLike[str] | None
    windows: int
    window: int
    provider: str | None


@dataclass(frozen=True)
class Trial:
    """An export, the KL that was expected of it, and what it has; bytes: of it and of the cache that is counted."""

    allocation: Allocation
    foretold: float
    made: ExportResult
    logits: Logits
    kl: float

    @property
    def bytes(self) -> int:
        return self.made.manifest.bytes["model"] + self.allocation.cache.bytes


class Judged(Protocol):
    """A model whose exports are made and measured, in one file or in several."""

    def export(self, recipes: Sequence[Recipe], work: WorkFolder) -> ExportResult: ...

    def logits(self, made: ExportResult) -> Logits:
        """Of an export, beside the float model's."""
        ...

    def costs(self, made: ExportResult, importance: Mapping[str, Importance]) -> dict[str, float]:
        """What linears of an export cost, see `deployed_costs`."""
        ...


@dataclass
class Trials:
    """Exports of one model with schemes that are chosen, each in a folder of its own.

    Attributes:
        chooser: knows what schemes cost, and learns.
        described: the text that KL is measured on.
        all: the exports so far.
    """

    chooser: SchemeAllocator
    described: str
    all: list[Trial] = field(default_factory=list)
    _model: Judged = field(kw_only=True)
    _folder: Path = field(kw_only=True)

    def attempt(self, allocation: Allocation) -> Trial:
        """Export with a choice, and measure its KL.

        Raises:
            InputError: NaN or Inf comes out.
            QExportError: as `export`.
        """
        trial, foretold = self._folder / str(len(self.all)), self.chooser.foretold(allocation)
        with claimed(trial, overwrite=False) as place:
            made = self._model.export(self.chooser.recipes(allocation), place)
        logits = self._model.logits(made)
        if logits.kl_mean is None:
            raise InputError("NaN or Inf comes out of the export", remedy="See `qexport validate` of a plain export")
        size, schemes = made.manifest.bytes["model"], Counter(schemes_of(made).values())
        logger.info("tried %s: %d bytes, KL %.4g (predicted %.4g)", dict(schemes), size, logits.kl_mean, foretold)
        self.all.append(Trial(allocation, foretold, made, logits, logits.kl_mean))
        self.chooser.wrong_by(self.all[-1].bytes - self.chooser.bytes(allocation))
        return self.all[-1]

    def learn(self, trial: Trial) -> None:
        """Let the chooser know what the recipe's method left of the costs that it had foretold."""
        real = self._model.costs(trial.made, self.chooser.importance)
        self.chooser.learn(trial.allocation, real, trial.kl)


@dataclass(frozen=True)
class _Decoder:
    """A decoder: as it is, with the passes over the whole model behind it, and what it is measured on."""

    prepared: Preparation
    original: CapturedModel
    captured: CapturedModel
    windows: torch.Tensor
    reference: FloatOutputs
    feeds: Sequence[Feeds]
    provider: str | None

    def export(self, recipes: Sequence[Recipe], work: WorkFolder) -> ExportResult:
        return pipeline.run(self.prepared.of_part(self.original, recipes[0], self.prepared.options), work)

    def logits(self, made: ExportResult) -> Logits:
        run = deployed_logits(made.folder, made.manifest, self.windows.shape[1], provider=self.provider)
        return compare_logits(self.reference, self.windows, run, partial(self.prepared.options.progress, "logits"))

    def costs(self, made: ExportResult, importance: Mapping[str, Importance]) -> dict[str, float]:
        return deployed_costs(
            made.folder, made.manifest, self.captured, self.feeds, importance, transformed=transforms(made.folder),
            provider=self.provider, progress=partial(self.prepared.options.progress, "costs"),
        )  # fmt: skip


@contextmanager
def trials(
    prepared: Preparation, judge: Judge, folder: Path, most: int | None = None, context: int | None = None
) -> Iterator[Trials]:
    """Measure what schemes cost in every linear of a decoder, and get ready to try some.

    Args:
        folder: where exports are made.
        most: bytes of a file that is to be found; that there is none is said before the work begins.
        context: tokens whose keys and values the bytes are of too.

    Raises:
        InputError: the model is no decoder, there is no text, or so few bytes are not enough.
        RecipeError: the recipe quantizes activations, or nothing.
    """
    options, progress = prepared.options, prepared.options.progress
    original = _decoder(prepared)
    captured = capture(prepared.of_part(original, prepared.recipe, options)).captured
    original.reader = check_reader(captured)  # not again for every export
    feeds = _feeds(captured, prepared.recipe, prepared.data, progress)
    chooser = SchemeAllocator([PricedModel(
        captured, prepared.recipe, prepared.target.candidates, prepared.target.dtype.itemsize, options.attention, feeds,
        partial(progress, "costs"), counted=None if context is None else counted_cache(captured, prepared, context),
    )])  # fmt: skip
    window = min(judge.window, captured.settings.get("max_position_embeddings") or judge.window)
    judged = choose_text(captured, judge.text, judge.windows, window, partial(progress, "text"))
    if most is not None:
        chooser.within_bytes(most)
    held = original.copy()  # as it is, whose last block stays loaded
    reference = FloatOutputs(held, decoder_feeds(held, judged.windows), ("logits",), partial(progress, "float model"))
    try:
        with FloatFindings() as found:
            prepared = replace(prepared, findings=found)
            model = _Decoder(prepared, original, captured, judged.windows, reference, feeds, judge.provider)
            yield Trials(chooser, judged.described, _model=model, _folder=folder)
    finally:
        reference.close()


def counted_cache(captured: CapturedModel, prepared: Preparation, tokens: int) -> CountedCache:
    """The ways to keep keys and values among which mixed precision chooses.

    Raises:
        InputError: the model keeps none, or reads no text of so many tokens.
    """
    longest = captured.settings.get("max_position_embeddings")
    if tokens < 1 or (longest is not None and tokens > longest):
        most = "" if longest is None else f" to {longest:,}, which is what the model reads"
        raise InputError(f"{tokens:,} tokens", place="context", remedy=f"Give from 1{most}")
    if not numbers_a_token(captured):
        raise InputError("the model keeps no keys and values", place="context", remedy="Leave it out")
    target, recipe = prepared.target, prepared.recipe
    own = [method for method in recipe.methods if isinstance(method, CacheMethod)]
    offered = [method for kind in methods() if issubclass(kind, CacheMethod) for method in kind.candidates()]
    usable = own or [m for m in offered if _takes_cache(captured, recipe, m, target, prepared.options.attention)]
    return CountedCache(tokens, usable, not own, 8 * target.dtype.itemsize, target.e4m3_cache)


def _takes_cache(captured: CapturedModel, recipe: Recipe, method: CacheMethod, target: Target, attention: str) -> bool:
    try:
        check_cache(captured, recipe.model_copy(update={method.key: method}), target, attention)
    except QExportError as error:
        logger.info("keys and values stay in floats: %s", error)
        return False
    return True


def _decoder(prepared: Preparation) -> CapturedModel:
    """The model as a graph.

    Raises:
        InputError: it is no decoder.
    """
    place = str(prepared.source) if isinstance(prepared.source, ModelFolder) else type(prepared.source).__name__
    kind = "module"
    if not isinstance(prepared.source, torch.nn.Module):
        captured = capture_model(prepared.source, placement=prepared.options.placement)
        if captured.kind == "decoder":
            if not isinstance(prepared.source, CapturedModel):
                for note in captured.notes:
                    logger.warning("%s", note)
            return captured
        kind = captured.kind
    raise InputError(f"schemes are chosen by what they cost a decoder's logits, and its kind is {kind}", place=place)


def schemes_of(made: ExportResult) -> dict[str, str]:
    """Of every quantized linear, and of a quantized table of embeddings, by name."""
    tables = {table.name: table.scheme for table in made.embeddings}
    linears = {linear.name: linear.scheme for linear in made.plan}
    return {name: scheme.name for name, scheme in (tables | linears).items() if scheme is not None}


def _feeds(captured: CapturedModel, recipe: Recipe, data: Any, progress: Progress) -> list[Feeds]:
    """The first tokens of the calibration data, each sequence alone."""
    batches, _ = calibration_batches(captured, recipe, data, progress)
    ids_name = next(port.value for port in captured.inputs if port.name == "input_ids")
    longest = min(_LENGTH, captured.settings.get("max_position_embeddings") or _LENGTH)
    feeds: list[Feeds] = []
    left, stream = TOKENS, batches()
    for batch, mask in zip(stream.batches, stream.masks, strict=True):
        for row, ids in enumerate(batch[ids_name]):
            if left > 0:
                real = slice(None) if mask is None else mask[row].to(CPU)
                ids = ids.to(CPU)[real][: min(left, longest)]
                feeds.append(decoder_inputs(captured, ids[None], torch.ones_like(ids)[None]))
                left -= len(ids)
    return feeds
