"""The models of a study, run step by step: the float one in PyTorch, exports in ONNX Runtime."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import NumericsError
from ..runtime.decoder import Decoder
from ..runtime.sampling import choose
from .grid import Draw


class Writer(Protocol):
    """A model that continues one text; name: of its format."""

    name: str

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        """Begin a text: the logits [vocabulary] behind its prompt."""

    def step(self, token: int) -> np.ndarray:
        """Append a token: the logits [vocabulary] behind it, the caller's to keep."""

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """The logits that predict each of `tokens` behind the prompt, float32 [tokens, vocabulary]."""


class FloatWriter:
    """The float model in PyTorch; `run` is what `calibrate.float_model.running` yields."""

    def __init__(self, name: str, run: Callable[..., tuple[Tensor, Any]]):
        self.name, self._run, self._past = name, run, None

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        self._past = None
        return self._append(prompt)

    def step(self, token: int) -> np.ndarray:
        return self._append([token])

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        logits, _ = self._run(torch.tensor([[*prompt, *tokens[:-1]]]), None, len(tokens))
        return logits[0].float()

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        logits, self._past = self._run(torch.tensor([list(tokens)]), self._past, 1)
        return logits[0, -1].float().numpy()


class ExportWriter:
    """An export in ONNX Runtime.

    Args:
        piece: most new tokens in one call behind a prompt when a text is forced. Files that tell prompts from steps
            compute something else for longer calls, and files with the last logits alone take one token at a time.
    """

    def __init__(self, name: str, decoder: Decoder, piece: int | None):
        self.name, self._decoder, self._piece = name, decoder, piece

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        self._decoder.reset()
        return self._append(prompt)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._append([token])[-1]

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        found = [self.start(prompt)[None]]
        size = self._piece or len(tokens)
        for begin in range(0, len(tokens) - 1, size):
            found.append(self._append(tokens[begin : min(begin + size, len(tokens) - 1)]))
        return torch.from_numpy(np.concatenate(found))

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        return self._decoder.run(np.array([tokens], np.int64))[0].astype(np.float32)


@dataclass(frozen=True)
class Written:
    """A text.

    Attributes:
        tokens: without the prompt; the end-of-sequence token, if met, is the last.
        seconds: of every step behind the prompt, choosing the token not included: one fewer than tokens.
        logits: that each token was chosen by, float32 [tokens, vocabulary]; [0] where they were not kept.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    logits: Tensor


def write(
    writer: Writer, prompt: Sequence[int], draw: Draw, stream: int, longest: int, eos: set[int], *, keep: bool = False
) -> Written:
    """Continue a prompt.

    Every token takes one random number from a generator that knows nothing but the seed and the stream, so the n-th
    token of a text is drawn by the same number whatever model writes it.

    Args:
        stream: which random numbers of the seed: the index of the prompt.
        longest: new tokens at most.
        keep: keep the logits.

    Raises:
        NumericsError: NaN in the logits.
    """
    sampling = draw.sampling
    generators = [np.random.default_rng([draw.seed, stream])] if sampling else None
    tokens: list[int] = []
    seconds: list[float] = []
    kept: list[np.ndarray] = []
    logits = writer.start(prompt)
    while True:
        if np.isnan(logits).any():
            raise NumericsError(
                "the logits hold NaN", place=f"{writer.name}, token {len(tokens) + 1} of a text",
                remedy="`qexport validate` finds the layer it comes from",
            )  # fmt: skip
        tokens.append(int(choose(logits[None], sampling, generators)[0]))
        if keep:
            kept.append(logits)
        if tokens[-1] in eos or len(tokens) == longest:
            break
        begin = perf_counter()
        logits = writer.step(tokens[-1])
        seconds.append(perf_counter() - begin)
    return Written(tuple(tokens), tuple(seconds), torch.from_numpy(np.stack(kept)) if keep else torch.empty(0))
