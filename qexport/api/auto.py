"""Export with schemes chosen for a size or for a KL: measure what schemes cost, choose, export, measure the result."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact.output import WorkFolder, claimed
from ..capture.graph import CapturedModel
from ..errors import InputError
from ..mixed_precision.caches import UNCOUNTED, CacheChoice
from ..mixed_precision.curve import Curve, knee
from ..models.source import ModelFolder, source_path
from ..progress import Progress, no_progress
from ..recipe.recipe import Recipe
from ..runtime.provider import provider_named
from ..validation.report import Logits
from ..validation.report_store import keep
from .curve import trace
from .options import Options
from .result import ExportResult
from .seq2seq.trials import trials_of_parts
from .stages.preparing import Preparation, Request, prepare
from .trials import Judge, Trial, Trials, schemes_of, trials
from .vision_language.trials import trials_of_pictures

# A file within this share below the KL asked for is not made smaller again.
_CLOSE, _ENOUGH_EXPORTS, _MOST_EXPORTS = 0.1, 2, 5


@dataclass(frozen=True)
class AutoResult:
    """What an automatic export wrote.

    Attributes:
        export: the export, as `export` returns it.
        asked: "max_bytes" or "max_kl", and its number; empty where only a curve was asked for. "context": the tokens
            of a text whose keys and values are counted.
        schemes: of every quantized linear, and of a quantized table of embeddings, by name.
        predicted_kl: by the costs, corrected by what earlier exports measured.
        logits: as measured.
        text: what that was measured on.
        exports: how many it took.
        curve: KL against bytes, where it was asked for.
        cache: how keys and values are kept, where the budget counts those of a text.
    """

    export: ExportResult
    asked: Mapping[str, float]
    schemes: Mapping[str, str]
    predicted_kl: float
    logits: Logits
    text: str
    exports: int
    curve: Curve | None = None
    cache: CacheChoice = UNCOUNTED

    def as_dict(self) -> dict[str, Any]:
        """The choice in plain types, as report.json keeps it under "auto"; "schemes": how many have each."""
        scores, cache = self.logits, self.cache
        return {
            **({"cache": {"numbers": cache.numbers, "bytes": cache.bytes}} if cache.numbers else {}),
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
    curve: bool = False,
    context: int | None = None,
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
    calibration data. Of an encoder-decoder both files have one budget: gradients of what the decoder writes about the
    calibration's sources go on through the encoder. So have the three of a model of pictures and text, by gradients of
    texts about pictures.

    Args:
        model: a Hugging Face id, a folder, a GGUF file, or a captured model, which stays as it is.
        recipe: everything but the schemes: what it keeps in float stays so, and it says how weights are found.
        out_dir: as `export` takes it.
        max_bytes: the most bytes of the model's files; either this or max_kl, or neither with a curve.
        max_kl: the largest mean KL from the float model, as measured on `text`.
        curve: also choose for sizes from the smallest schemes to the closest, and measure some of these exports. The
            folder gets what was found in report.json, and a recipe for each size. Without a bound it is the export
            behind which bytes gain little.
        context: tokens of a text whose keys and values the bytes are of too, beside the model's files. Whether they
            are kept in floats, in 8 or in 4 bits is then chosen with the schemes, by what each costs.
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
            without text, or a context that it does not have.
        RecipeError: the recipe quantizes activations.
        QExportError: as `export`.
    """
    asked = {name: bound for name, bound in (("max_bytes", max_bytes), ("max_kl", max_kl)) if bound is not None}
    if len(asked) > 1 or not (asked or curve):
        raise InputError("give either the most bytes or the largest KL", place="max_bytes, max_kl")
    if max_kl is not None and max_kl <= 0:
        raise InputError(f"only the float model has a KL of {max_kl:g}", place="max_kl", remedy="Give a number above 0")
    options = Options(
        target=target, dtype=dtype, attention=attention, seed=seed, requantize=requantize,
        trust_remote_code=trust_remote_code, progress=progress, device=device, offload=offload,
    )  # fmt: skip
    request = Request.of(model, recipe, options, calibration)
    judge = Judge(text, windows, window, None if provider is None else provider_named(provider))
    with claimed(Path(out_dir), overwrite, source_path(model)) as work:
        return _search(work, prepare(request), asked, judge, curve, context)


def _search(
    work: WorkFolder, prepared: Preparation, asked: Mapping[str, float], judge: Judge, curve: bool,
    context: int | None,
) -> AutoResult:  # fmt: skip
    """Export with schemes for one bound, "max_bytes" or "max_kl", and again with what was learnt from that."""
    most = asked.get("max_bytes")
    of_parts = trials_of_parts if prepared.in_two_parts else trials_of_pictures if prepared.in_three_parts else None
    if of_parts is not None and curve:
        raise InputError(
            "each part of the model has a recipe of its own, and a point of a curve is one", place="curve",
            remedy="Give max_bytes or max_kl",
        )  # fmt: skip
    if of_parts is not None and context is not None:
        raise InputError(
            "the cache of a model in several files is not counted", place="context", remedy="Leave it out"
        )
    places = judge, work.folder / "trials", None if most is None else int(most)
    ready = trials(prepared, *places, context) if of_parts is None else of_parts(prepared, *places)
    with ready as tried:
        best: Trial | None = None
        if most is not None:
            best = _for_bytes(tried, int(most))
        elif asked:
            best = _for_kl(tried, asked["max_kl"])
        drawn = trace(tried) if curve else None
        if best is None:
            best = tried.all[knee([(trial.bytes, trial.kl) for trial in tried.all])]
        made = replace(best.made, folder=work.given, parts={
            part: replace(own, folder=work.given / part) for part, own in best.made.parts.items()
        })  # fmt: skip
        result = AutoResult(
            made, asked if context is None else {**asked, "context": context}, schemes_of(best.made), best.foretold,
            best.logits, tried.described, len(tried.all), None if drawn is None else drawn.curve,
            best.allocation.cache,
        )  # fmt: skip
        keep(best.made.folder, "auto", result.as_dict())
        if drawn is not None:
            drawn.keep(best.made.folder)
        with work.appearing() as folder:
            os.replace(best.made.folder, folder)
        result.export.kept.extend(work.kept)
        return result


def _for_bytes(tried: Trials, most: int) -> Trial:
    """The closest of some exports that are small enough."""
    small: list[Trial] = []
    trial = None
    while len(small) < _ENOUGH_EXPORTS:
        if trial is not None:
            tried.learn(trial)
        allocation = tried.chooser.within_bytes(most)
        if small and small[-1].allocation.picked == allocation.picked:
            break
        trial = tried.attempt(allocation)
        if trial.bytes <= most:
            small.append(trial)
    return min(small, key=lambda trial: trial.kl)


def _for_kl(tried: Trials, most: float) -> Trial:
    """The smallest of some exports that are close enough.

    Raises:
        InputError: the best schemes are not close enough.
    """
    close: list[Trial] = []
    while len(tried.all) < _MOST_EXPORTS and len(close) < _ENOUGH_EXPORTS:
        if tried.all:
            tried.learn(tried.all[-1])
        allocation = tried.chooser.within_kl(most * (1 - _CLOSE / 2)) or tried.chooser.best()
        if any(trial.allocation.picked == allocation.picked for trial in tried.all):
            break  # there is nothing else to try
        trial = tried.attempt(allocation)
        if trial.kl <= most:
            close.append(trial)
            if trial.kl >= most * (1 - _CLOSE):
                break
    if not close:
        best = min(tried.all, key=lambda trial: trial.kl)
        raise InputError(
            f"not met: {best.kl:.4g} with {best.bytes:,} bytes", place="max_kl",
            remedy="Give a larger one, or a recipe that keeps more in float",
        )  # fmt: skip
    return min(close, key=lambda trial: trial.bytes)
