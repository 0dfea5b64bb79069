"""Export with schemes chosen for a size or for a KL: measure what schemes cost, choose, export, measure the result."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..artifact.output import WorkFolder, claimed
from ..calibrate.block_activations import Feeds, decoder_inputs
from ..calibrate.data import calibration_batches
from ..capture.graph import CapturedModel
from ..device import CPU
from ..errors import InputError
from ..mixed_precision.allocate import Allocation
from ..mixed_precision.allocator import SchemeAllocator
from ..models.source import ModelFolder, source_path
from ..progress import Progress, no_progress
from ..recipe.recipe import Recipe
from ..runtime.provider import provider_named
from ..validation.account import transforms
from ..validation.kl_costs import deployed_costs
from ..validation.logits import compare_logits, deployed_logits
from ..validation.reader import check_reader
from ..validation.reference import FloatOutputs, decoder_feeds
from ..validation.report import Logits
from ..validation.report_store import keep
from ..validation.text import choose_text
from .options import Options
from .result import ExportResult
from .stages import pipeline
from .stages.capturing import capture, capture_model
from .stages.preparing import Preparation, Request, prepare

logger = logging.getLogger(__name__)

_TOKENS, _LENGTH = 1024, 512  # on which costs are measured, and tokens of a sequence at most
# A file within this share below the KL asked for is not made smaller again.
_CLOSE, _ENOUGH_EXPORTS, _MOST_EXPORTS = 0.1, 2, 5


@dataclass(frozen=True)
class AutoResult:
    """What an automatic export wrote.

    Attributes:
        export: the export, as `export` returns it.
        asked: "max_bytes" or "max_kl", and its number.
        schemes: of every quantized linear, and of a quantized table of embeddings, by name.
        predicted_kl: by the costs, corrected by what earlier exports measured.
        logits: as measured.
        text: what that was measured on.
        exports: how many it took.
    """

    export: ExportResult
    asked: Mapping[str, float]
    schemes: Mapping[str, str]
    predicted_kl: float
    logits: Logits
    text: str
    exports: int

    def as_dict(self) -> dict[str, Any]:
        """The choice in plain types, as report.json keeps it under "auto"; "schemes": how many have each."""
        scores = self.logits
        return {
            "asked": dict(self.asked), "windows": scores.windows, "window": scores.window,
            "top1_agreement": scores.top1_agreement, "choices": dict(self.schemes),
            "predicted_kl": self.predicted_kl, "kl": scores.kl_mean, "perplexity": scores.perplexity,
            "float_perplexity": scores.float_perplexity, "text": self.text, "exports": self.exports,
            "bytes": self.export.manifest.bytes["model"], "schemes": dict(Counter(self.schemes.values())),
        }  # fmt: skip


def export_auto(
    model: str | os.PathLike[str] | ModelFolder | CapturedModel,
    recipe: str | os.PathLike[str] | Recipe = "compact",
    *,
    out_dir: str | os.PathLike[str],
    max_bytes: int | None = None,
    max_kl: float | None = None,
    target: str = "cpu",
    calibration: Any = None,
    text: str | os.PathLike[str] | None = None,
    windows: int = 8,
    window: int = 512,
    overwrite: bool = False,
    dtype: str | None = None,
    attention: str = "grouped",
    provider: str | None = None,
    seed: int | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    device: str = "cpu",
    offload: bool = False,
) -> AutoResult:
    """Quantize a language model with the schemes that keep it closest to the float one in a file of a given size.

    What each scheme would cost in each linear is found by one pass forward and one back through the float model, on the
    calibration data.

    Args:
        model: a Hugging Face id, a folder, a GGUF file, or a captured model, which stays as it is.
        recipe: everything but the schemes: what it keeps in float stays so, and it says how weights are found.
        out_dir: as `export` takes it.
        max_bytes: the most bytes of the model's files; either this or max_kl.
        max_kl: the largest mean KL from the float model, as measured on `text`.
        target: as `export` takes it.
        calibration: as `export` takes it.
        text: as `validate` takes it; the KL of the result is measured on it.
        windows: how many stretches of the text.
        window: tokens in each, no more than what the model reads.
        overwrite: as `export` takes it.
        dtype: as `export` takes it.
        attention: as `export` takes it.
        provider: as `validate` takes it; the KL of the result is measured there.
        seed: as `export` takes it.
        requantize: as `export` takes it; a model that is quantized already needs it.
        trust_remote_code: as `export` takes it.
        progress: called with (stage, what, done, total).
        device: as `export` takes it.
        offload: as `export` takes it.

    Raises:
        InputError: neither bound, or both; a size that no choice meets, or a KL that the best choices miss; a model
            without text.
        RecipeError: the recipe quantizes activations.
        QExportError: as `export`.
    """
    asked = {name: bound for name, bound in (("max_bytes", max_bytes), ("max_kl", max_kl)) if bound is not None}
    if len(asked) != 1:
        raise InputError("give either the most bytes or the largest KL", place="max_bytes, max_kl")
    if max_kl is not None and max_kl <= 0:
        raise InputError(f"a KL of {max_kl:g} takes the float model", place="max_kl", remedy="Give a number above 0")
    options = Options(
        target=target, dtype=dtype, attention=attention, seed=seed, requantize=requantize,
        trust_remote_code=trust_remote_code, progress=progress, device=device, offload=offload,
    )  # fmt: skip
    request = Request.of(model, recipe, options, calibration)
    judge = _Judge(text, windows, window, None if provider is None else provider_named(provider))
    with claimed(Path(out_dir), overwrite, source_path(model)) as work:
        return _search(work, prepare(request), asked, judge)


@dataclass(frozen=True)
class _Judge:
    """What the KL of exports is measured on, see `export_auto`."""

    text: str | os.PathLike[str] | None
    windows: int
    window: int
    provider: str | None


def _search(work: WorkFolder, prepared: Preparation, asked: Mapping[str, float], judge: _Judge) -> AutoResult:
    """Export with schemes for one bound, "max_bytes" or "max_kl", and again with what was learnt from that."""
    most = asked.get("max_bytes")
    options, progress = prepared.options, prepared.options.progress
    original = _decoder(prepared)
    captured = capture(prepared.of_part(original, prepared.recipe, options)).captured
    original.reader = check_reader(captured)  # not again for every export
    feeds = _feeds(captured, prepared.recipe, prepared.data, progress)
    chooser = SchemeAllocator(
        captured, prepared.recipe, prepared.target.candidates, prepared.target.dtype.itemsize, options.attention, feeds,
        partial(progress, "costs"),
    )  # fmt: skip
    window = min(judge.window, captured.settings.get("max_position_embeddings") or judge.window)
    judged = choose_text(captured, judge.text, judge.windows, window, partial(progress, "text"))
    if most is not None:
        chooser.within_bytes(int(most))  # what cannot be is said before the work begins
    held = original.copy()  # as it is, whose last block stays loaded
    reference = FloatOutputs(held, decoder_feeds(held, judged.windows), ("logits",), partial(progress, "float model"))
    trials, names = work.folder / "trials", count()

    def attempt(allocation: Allocation) -> _Trial:
        trial, foretold = trials / str(next(names)), chooser.left * allocation.kl
        with claimed(trial, overwrite=False) as place:
            made = pipeline.run(prepared.of_part(original, chooser.recipe(allocation), options), place)
        run = deployed_logits(trial, made.manifest, judged.windows.shape[1], provider=judge.provider)
        logits = compare_logits(reference, judged.windows, run, partial(progress, "logits"))
        if logits.kl_mean is None:
            raise InputError("NaN or Inf comes out of the export", remedy="See `qexport validate` of a plain export")
        size, schemes = made.manifest.bytes["model"], Counter(_schemes(made).values())
        logger.info("tried %s: %d bytes, KL %.4g (foretold %.4g)", dict(schemes), size, logits.kl_mean, foretold)
        return _Trial(allocation, foretold, made, logits, logits.kl_mean)

    def learn(trial: _Trial) -> None:
        folder = trial.made.folder
        real = deployed_costs(
            folder, trial.made.manifest, captured, feeds, chooser.importance, transformed=transforms(folder),
            provider=judge.provider, progress=partial(progress, "costs"),
        )  # fmt: skip
        chooser.learn(trial.allocation, real, trial.kl)

    try:
        if most is None:
            best, exports = _for_kl(chooser, asked["max_kl"], attempt, learn)
        else:
            best, exports = _for_bytes(chooser, int(most), attempt, learn)
        result = AutoResult(
            replace(best.made, folder=work.given), asked, _schemes(best.made), best.foretold,
            best.logits, judged.described, exports,
        )  # fmt: skip
        keep(best.made.folder, "auto", result.as_dict())
        with work.appearing() as folder:
            os.replace(best.made.folder, folder)
        result.export.kept.extend(work.kept)
        return result
    finally:
        reference.close()


def _decoder(prepared: Preparation) -> CapturedModel:
    """The model as a graph.

    Raises:
        InputError: it is no decoder.
    """
    place = str(prepared.source) if isinstance(prepared.source, ModelFolder) else type(prepared.source).__name__
    kind = "encoder-decoder" if prepared.in_two_parts else "module"
    if not prepared.in_two_parts and not isinstance(prepared.source, torch.nn.Module):
        captured = capture_model(prepared.source, placement=prepared.options.placement)
        if captured.kind == "decoder":
            if not isinstance(prepared.source, CapturedModel):
                for note in captured.notes:
                    logger.warning("%s", note)
            return captured
        kind = captured.kind
    raise InputError(f"schemes are chosen for decoders, and its kind is {kind}", place=place)


@dataclass(frozen=True)
class _Trial:
    """An export, the KL that was expected of it, and what it has."""

    allocation: Allocation
    foretold: float
    made: ExportResult
    logits: Logits
    kl: float

    @property
    def bytes(self) -> int:
        return self.made.manifest.bytes["model"]


def _for_bytes(
    chooser: SchemeAllocator, most: int, attempt: Callable[[Allocation], _Trial], learn: Callable[[_Trial], None]
) -> tuple[_Trial, int]:
    """The closest of some exports that are small enough, and how many there were."""
    small: list[_Trial] = []
    exports, trial = 0, None
    while len(small) < _ENOUGH_EXPORTS:
        if trial is not None:
            learn(trial)
        allocation = chooser.within_bytes(most)
        if small and small[-1].allocation.schemes == allocation.schemes:
            break
        trial, exports = attempt(allocation), exports + 1
        chooser.wrong_by(trial.bytes - chooser.bytes(allocation))
        if trial.bytes <= most:
            small.append(trial)
    return min(small, key=lambda trial: trial.kl), exports


def _for_kl(
    chooser: SchemeAllocator, most: float, attempt: Callable[[Allocation], _Trial], learn: Callable[[_Trial], None]
) -> tuple[_Trial, int]:
    """The smallest of some exports that are close enough, and how many there were.

    Raises:
        InputError: the best schemes are not close enough.
    """
    trials: list[_Trial] = []
    close: list[_Trial] = []
    while len(trials) < _MOST_EXPORTS and len(close) < _ENOUGH_EXPORTS:
        if trials:
            learn(trials[-1])
        allocation = chooser.within_kl(most * (1 - _CLOSE / 2)) or chooser.best()
        if any(trial.allocation.schemes == allocation.schemes for trial in trials):
            break  # there is nothing else to try
        trials.append(attempt(allocation))
        if trials[-1].kl <= most:
            close.append(trials[-1])
            if trials[-1].kl >= most * (1 - _CLOSE):
                break
    if not close:
        best = min(trials, key=lambda trial: trial.kl)
        raise InputError(
            f"not met: {best.kl:.4g} with {best.bytes:,} bytes", place="max_kl",
            remedy="Give a larger one, or a recipe that keeps more in float",
        )  # fmt: skip
    return min(close, key=lambda trial: trial.bytes), len(trials)


def _schemes(made: ExportResult) -> dict[str, str]:
    tables = {table.name: table.scheme for table in made.embeddings}
    linears = {linear.name: linear.scheme for linear in made.plan}
    return {name: scheme.name for name, scheme in (tables | linears).items() if scheme is not None}


def _feeds(captured: CapturedModel, recipe: Recipe, data: Any, progress: Progress) -> list[Feeds]:
    """The first tokens of the calibration data, each sequence alone."""
    batches, _ = calibration_batches(captured, recipe, data, progress)
    ids_name = next(port.value for port in captured.inputs if port.name == "input_ids")
    longest = min(_LENGTH, captured.settings.get("max_position_embeddings") or _LENGTH)
    feeds: list[Feeds] = []
    left, stream = _TOKENS, batches()
    for batch, mask in zip(stream.batches, stream.masks, strict=True):
        if mask is None:
            raise TypeError("texts come with their masks")
        for ids, real in zip(batch[ids_name], mask, strict=True):
            if left > 0:
                ids = ids.to(CPU)[real.to(CPU)][: min(left, longest)]
                feeds.append(decoder_inputs(captured, ids[None], torch.ones_like(ids)[None]))
                left -= len(ids)
    return feeds
