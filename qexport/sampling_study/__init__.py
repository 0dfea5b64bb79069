"""Texts of several exports and of their float model under sampling settings (after arXiv 2309.05210)."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime

from ..artifact.names import public_name
from ..capture.graph import CapturedModel
from ..progress import Progress, no_progress
from ..runtime.provider import provider_named
from ..runtime.seq2seq import is_seq2seq
from .conclusions import choices, conclude
from .grid import Draw, Grid, read_prompts
from .loaded import Asked, decoders
from .pairs import pairs
from .plot import check_plot, plot_study
from .result import BestFormat, ComparedModel, Study, StudyRow, check_place
from .subjects import FLOAT
from .summary import TextMeasures, rows
from .texts import Estimate, Sample, estimate, write_all

__all__ = [
    "BestFormat",
    "Draw",
    "Estimate",
    "ComparedModel",
    "Grid",
    "StudyRow",
    "Study",
    "check_place",
    "check_plot",
    "plot_study",
    "study",
]


def study(
    folders: Sequence[str | os.PathLike],
    reference: str | os.PathLike | CapturedModel,
    *,
    grid: Grid | None = None,
    prompts: str | os.PathLike | Sequence[str] | None = None,
    threads: int | None = None,
    provider: str | None = None,
    trust_remote_code: bool = False,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    progress: Progress = no_progress,
) -> Study:
    """Let exports of one model and the float model continue prompts under many sampling settings, and compare texts.

    Prompts are the sources of encoder-decoders, and what these write about them is compared.

    The float model runs in PyTorch in float32, exports run in ONNX Runtime; all are in memory at once and take turns
    text by text. Every format draws with the same random numbers for the same seed and prompt.

    Args:
        folders: what `export` wrote, all from one model; a format is called by its folder's name.
        reference: that model: a Hugging Face id, a folder, a GGUF file, or the captured model; of encoder-decoders an
            id or a folder.
        grid: what to vary; None takes the defaults of `Grid`.
        prompts: a UTF-8 file with one a line, or a sequence of texts; None takes those of `grid.PROMPTS`.
        threads: threads within an ONNX Runtime operator.
        provider: execution provider; None takes the one each file was made for.
        trust_remote_code: run Python code that comes with the reference.
        on_estimate: called once, before the long part, with how much there is to do.
        progress: called with (stage, what, done, total).

    Raises:
        InputError: a folder is no decoder or was made from another model, the reference has no tokenizer or reads no
            text, a prompt does not fit, a setting is out of range, or the models do not fit into memory together.
        NumericsError: NaN in the logits of a format.
        RuntimeProblem: ONNX Runtime refuses a model or does not have the provider.
    """
    begin, grid, texts = time.perf_counter(), grid or Grid(), read_prompts(prompts)
    provider = None if provider is None else provider_named(provider)
    ready = pairs if any(is_seq2seq(Path(folder)) for folder in folders) else decoders
    asked = Asked(folders, reference, texts, grid.longest, threads, provider, trust_remote_code, progress)
    with ready(asked) as models:
        on_estimate(estimate(models.own, models.exports, models.prompts[0], grid, len(models.prompts)))
        samples = write_all(
            models.own, models.exports, models.prompts, grid, models.ends, partial(progress, "texts")
        )  # fmt: skip
    formats = [
        ComparedModel(
            name=FLOAT, folder="", runtime="PyTorch", model_bytes=models.float_bytes,
            tokens_per_second=_speed(samples, FLOAT),
        ),
        *(
            ComparedModel(
                name=subject.name, folder=str(subject.folder), runtime="ONNX Runtime", model_bytes=subject.model_bytes,
                tokens_per_second=_speed(samples, subject.name),
            )
            for subject in models.subjects
        ),
    ]  # fmt: skip
    sizes = {subject.name: subject.model_bytes for subject in models.subjects}
    measured = {length: TextMeasures(samples, FLOAT, length) for length in grid.max_new_tokens}
    table = rows(measured, [format.name for format in formats])
    chosen = [choice for length, found in measured.items() for choice in choices(found, sizes, length)]
    return Study(
        reference=public_name(models.reference), prompts=texts, seeds=grid.seeds, temperatures=grid.temperatures,
        top_ks=grid.top_ks, max_new_tokens=grid.max_new_tokens, threads=threads, provider=provider or "",
        formats=tuple(formats), rows=tuple(table), choices=tuple(chosen),
        conclusions=tuple(conclude(chosen, table, measured[grid.longest], sizes, grid.longest)),
        versions={name: version(name) for name in ("qexport", "torch", "transformers", "numpy")}
        | {"onnxruntime": onnxruntime.__version__},
        seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip


def _speed(samples: Sequence[Sample], name: str) -> float | None:
    """Median over texts of steps a second; None where no text has a second token."""
    speeds = [len(s.seconds) / sum(s.seconds) for s in samples if s.format == name and s.seconds]
    return float(np.median(speeds)) if speeds else None
