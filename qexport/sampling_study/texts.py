"""All texts of a study, every format's turn after turn, and what can be measured only while the models are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from ..progress import StageProgress
from ..quant.metrics import nll
from .grid import Draw, Grid
from .measures import total_variation
from .writers import Writer, write

_TRIED = 8


@dataclass(frozen=True)
class Sample:
    """One text of one format.

    Attributes:
        format: its name; prompt: index of the prompt; draw: settings and seed.
        tokens: new ones; seconds: see `Written`.
        nll: negative log-likelihood of every token under the float model, float64 [tokens].
        distance: total variation between the float model's next-token distribution and this format's for every token of
            the float model's text, both models reading that text, float64 [tokens of the float model's text].
    """

    format: str
    prompt: int
    draw: Draw
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    nll: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """What is ahead: texts of all formats, tokens of each at most, and seconds at most, by a short trial."""

    texts: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.texts} texts of up to {self.tokens} tokens: {_duration(self.seconds)} at most"


def estimate(
    reference: Writer, exports: Sequence[Writer], prompt: Sequence[int], grid: Grid, prompts: int
) -> Estimate:
    """Let every format write a few tokens, which warms it up, and foretell the whole by it.

    Args:
        prompt: token ids to try on.
        prompts: how many there will be.
    """
    draw, tried, seconds = grid.draws()[-1], min(_TRIED, grid.longest), 0.0
    for timed in (False, True):
        begin = perf_counter()
        own = write(reference, prompt, draw, 0, tried, set(), keep=True)
        for writer in exports:
            text = write(writer, prompt, draw, 0, tried, set())
            total_variation(own.logits, writer.forced(prompt, own.tokens), draw.temperature, draw.top_k)
            nll(reference.forced(prompt, text.tokens), torch.tensor(text.tokens))
        seconds = (perf_counter() - begin) / tried if timed else 0.0
    texts = len(grid.draws()) * prompts
    return Estimate(texts * (1 + len(exports)), grid.longest, texts * grid.longest * seconds)


def write_all(
    reference: Writer,
    exports: Sequence[Writer],
    prompts: Sequence[Sequence[int]],
    grid: Grid,
    eos: set[int],
    progress: StageProgress,
) -> list[Sample]:
    """Let every format continue every prompt with every draw.

    The exports take turns there and back (A B, B A), so that a change in the machine's speed meets all of them alike.

    Args:
        prompts: token ids.
        eos: tokens that end a text.
        progress: called with (what, done, total).
    """
    samples, jobs = [], [(draw, index) for draw in grid.draws() for index in range(len(prompts))]
    for turn, (draw, index) in enumerate(jobs):
        progress(f"temperature {draw.temperature:g}, prompt {index + 1}", turn, len(jobs))
        prompt = prompts[index]
        own = write(reference, prompt, draw, index, grid.longest, eos, keep=True)
        zeros, cost = np.zeros(len(own.tokens)), nll(own.logits, torch.tensor(own.tokens)).numpy()
        samples.append(Sample(reference.name, index, draw, own.tokens, own.seconds, cost, zeros))
        for writer in exports if turn % 2 == 0 else reversed(exports):
            text = write(writer, prompt, draw, index, grid.longest, eos)
            apart = total_variation(own.logits, writer.forced(prompt, own.tokens), draw.temperature, draw.top_k)
            costs = cost
            if text.tokens != own.tokens:
                costs = nll(reference.forced(prompt, text.tokens), torch.tensor(text.tokens)).numpy()
            samples.append(Sample(writer.name, index, draw, text.tokens, text.seconds, costs, apart.numpy()))
    progress("", len(jobs), len(jobs))
    return samples


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
