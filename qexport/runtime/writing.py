"""From prompts to texts: which token comes next, and when a text ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Protocol

import numpy as np

from ..errors import InputError
from .drafts import KINDS, Draft, Drafts, Stakes, even_rows
from .row_cost import RowCost
from .sampling import Sampling, choose


@dataclass(frozen=True)
class Generation:
    """New tokens of each row, without the prompt; the end-of-sequence token, if met, is the last.

    Attributes:
        tokens: for each row of the batch, its new token ids.
        finished: for each row, whether it met an end-of-sequence token.
        prefill_seconds: time until the logits behind the prompt.
        decode_seconds: time of all the steps after that.
        calls: how often the decoder ran after that.
        guessed: how many tokens drafts guessed.
        right: and how many of them were written.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    prefill_seconds: float
    decode_seconds: float
    calls: int = 0
    guessed: int = 0
    right: int = 0


class Reader(Protocol):
    """What of a decoder it takes to write: see `Decoder`."""

    @property
    def past(self) -> int: ...

    @property
    def has_all_logits(self) -> bool: ...

    @property
    def forgets(self) -> bool: ...

    @property
    def row_cost(self) -> RowCost: ...

    def reset(self) -> None: ...

    def cut(self, length: int) -> None: ...

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray: ...


class Choice:
    """How tokens are chosen: the likeliest, or a draw with random numbers that each row has of its own.

    Args:
        rows: of the batch.
        never: tokens that are not chosen, nor guessed; never_first: nor these as the first.
    """

    def __init__(
        self, sampling: Sampling | None, rows: int, never: tuple[int, ...] = (), never_first: tuple[int, ...] = ()
    ):
        self._sampling, self.never, self._never_first = sampling, never, never_first
        self._draws = None if sampling is None else [np.random.default_rng([sampling.seed, i]) for i in range(rows)]

    def __call__(self, logits: np.ndarray, step: int) -> np.ndarray:
        """Token number `step` of each row: int64 [batch] for logits [batch, vocab]."""
        if without := [*self.never, *(() if step else self._never_first)]:
            logits = logits.copy()  # which is memory of the session
            logits[:, without] = -np.inf
        return choose(logits, self._sampling, self._draws)


class _Texts:
    """The new tokens of a batch while they grow."""

    def __init__(
        self, rows: int, most: int, ends: Sequence[int], choice: Choice, on_token: Callable[[int, int], None] | None
    ):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finished = np.zeros(rows, bool)
        self.calls = self.guessed = self.right = self._step = 0
        self._most, self._ends, self._choice, self._on_token = most, set(ends), choice, on_token

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return 0 if self.finished.all() else self._most - self._step

    def take(self, logits: np.ndarray) -> np.ndarray:
        """Choose the next token of every row behind logits [batch, vocab]; rows that ended get none."""
        chosen = self._choice(logits, self._step)
        for row in np.flatnonzero(~self.finished).tolist():
            token = int(chosen[row])
            self.tokens[row].append(token)
            self.finished[row] = token in self._ends
            if self._on_token:
                self._on_token(row, token)
        self._step += 1
        return chosen


def write(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    choice: Choice,
    on_token: Callable[[int, int], None] | None,
    drafts: Drafts | None,
) -> Generation:
    """Continue a batch of prompts; see `Decoder.generate`."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("there is nothing to continue: a prompt without tokens", remedy="Give at least one token")
    if drafts is not None and len(prompts) > 1:
        raise InputError(f"drafts are for one text, but there are {len(prompts)}", remedy="Write them one by one")
    if drafts is not None and not reader.has_all_logits:
        raise InputError(
            "the file computes only the logits of the last token, but drafts need those of every token",
            place="draft", remedy="Export without --logits last",
        )  # fmt: skip
    if drafts is not None and not reader.forgets:
        raise InputError(
            "it keeps states of layers, which cannot forget a wrong guess", place="draft", remedy="Leave it out"
        )  # fmt: skip
    reader.reset()
    length = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), length), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    texts = _Texts(len(prompts), max_new_tokens, ends, choice, on_token)
    start = perf_counter()
    logits = reader.run(ids, mask)[:, -1]
    prefill = perf_counter() - start
    if drafts is None:
        _one_by_one(reader, texts, logits, pad)
    else:
        _guessing(reader, texts, logits, prompts[0], drafts, set(choice.never))
    return Generation(
        tuple(map(tuple, texts.tokens)), tuple(map(bool, texts.finished)), prefill, perf_counter() - start - prefill,
        texts.calls, texts.guessed, texts.right,
    )  # fmt: skip


def _one_by_one(reader: Reader, texts: _Texts, logits: np.ndarray, pad: int) -> None:
    while texts.left:
        chosen = texts.take(logits)
        if texts.left:
            logits = reader.run(np.where(texts.finished, pad, chosen)[:, None])[:, -1]
            texts.calls += 1


def _guessing(
    reader: Reader, texts: _Texts, logits: np.ndarray, prompt: Sequence[int], drafts: Drafts, never: set[int]
) -> None:
    """One text, its next tokens guessed and read together."""
    draft, stakes = KINDS[drafts.kind](), Stakes(reader.row_cost)
    if draft.cheap:
        _learn(draft, stakes, prompt)
    else:
        draft.extend(prompt)
    if texts.left:
        draft.extend(texts.take(logits).tolist())
    while texts.left:
        sort, guesses = draft.guess(stakes.most if drafts.rows is None else drafts.rows - 1)
        guesses = list(takewhile(lambda token: token not in never, guesses))  # a picture's token stands for a row
        first = guesses[:1]
        if drafts.rows is None:
            guesses = guesses[: even_rows(min(stakes.guesses(sort), texts.left - 1))]
        last, before = texts.tokens[0][-1], reader.past
        filler = [] if drafts.rows is None else [last] * (drafts.rows - 1 - len(guesses))
        rows = reader.run(np.array([[last, *guesses, *filler]]))[0]
        right = _as_guessed(texts, draft, rows, guesses)
        stakes.note(sort, len(guesses), right)
        if first and not guesses:
            stakes.learn(sort, first == [texts.tokens[0][-1]])
        texts.calls, texts.guessed, texts.right = texts.calls + 1, texts.guessed + len(guesses), texts.right + right
        reader.cut(before + 1 + right)


def _learn(draft: Draft, stakes: Stakes, prompt: Sequence[int]) -> None:
    """Read a prompt, and record how it would have been guessed."""
    for token in prompt:
        sort, guess = draft.guess(1)
        stakes.learn(sort, guess == [token], read=1)
        draft.extend([token])


def _as_guessed(texts: _Texts, draft: Draft, rows: np.ndarray, guesses: Sequence[int]) -> int:
    """Take tokens as long as they are the guessed ones, and the one behind; how many guesses were right."""
    for right, row in enumerate(rows[: len(guesses) + 1]):
        (token,) = texts.take(row[None]).tolist()
        draft.extend([token])
        if not texts.left or right == len(guesses) or token != guesses[right]:
            return right
    raise AssertionError("behind the last guess there is a token")
