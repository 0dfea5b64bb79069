"""Where calibration tokens come from: a text file, strings, a data set, token tensors, chance, or the model itself."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..recipe.recipe import CalibrationSpec
from .datasets_source import dataset_text
from .self_text import Generate, write_text

# Characters tokenized at once: some tokenizers take time quadratic in the length of a string, and warn of long ones.
# A cut at the end of a line changes hardly a token.
_PIECE = 16384
# Texts that a model writes side by side: a step of a small model costs hardly more for 16 than for one.
_WRITTEN_TOGETHER = 16


@dataclass(frozen=True)
class Samples:
    """Calibration sequences, padded on the left as in batched generation.

    Attributes:
        input_ids: int64 [n, S]; 0 where attention_mask is 0.
        attention_mask: int64 [n, S]; 0 on padding, 1 on tokens; every row ends with 1.
        described: what they are, for reports.
    """

    input_ids: Tensor
    attention_mask: Tensor
    described: str


def load_samples(
    spec: CalibrationSpec,
    data: Sequence[str] | Tensor | np.ndarray | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    vocab_size: int,
    generate: Generate | None = None,
) -> Samples:
    """The calibration sequences that spec.source names, or those in `data`.

    - A text file, or "datasets:ID[:CONFIG]:SPLIT:COLUMN": the text is tokenized and cut into windows of
      spec.sequence_length tokens that do not overlap; spec.samples of them are taken, spread over the whole text, or
      all when there are fewer (`described` says so). A window starts with what the tokenizer puts before a text.
    - "self": text from the model, started by the tokenizer's first tokens and one random token each. Needs `generate`.
    - "random": tokens of the vocabulary that are not special, uniformly.
    - data, strings: one sequence each, all of them, cut after spec.sequence_length tokens, padded on the left to the
      longest.
    - data, token ids [n, S] as a tensor or array, or a mapping with input_ids and attention_mask as tokenizers return
      it: all of it; padding is moved to the left.

    The same arguments give the same samples.

    Args:
        tokenizer: a transformers tokenizer; needed for text, used for "self" and "random" where there is one.
        vocab_size: rows of the model's embedding; every id is below it.
        generate: (input_ids int64 [b, t], max_new_tokens, torch.Generator) -> int64 [b, t + max_new_tokens].

    Raises:
        InputError: no such file or data set column, text that is not UTF-8, empty, or shorter than one sequence, no
            sequences, ids outside the vocabulary, a missing tokenizer, generate or package.
        NumericsError: the model writes NaN.
    """
    if data is not None:
        samples = _from_data(data, spec, tokenizer)
    elif spec.source in ("self", "random"):
        samples = _from_vocabulary(spec, tokenizer, vocab_size, generate)
    else:
        text, name = _read(spec)
        samples = _windows(text, name, spec, _needed(tokenizer, name))
    outside = samples.input_ids[(samples.input_ids < 0) | (samples.input_ids >= vocab_size)]
    if len(outside):
        raise InputError(
            f"token id {int(outside[0])} is outside the model's vocabulary of {vocab_size}",
            place=samples.described,
            remedy="Take the tokenizer that belongs to the model",
        )
    return samples


def check_text(spec: CalibrationSpec | None, tokenizer: Any) -> None:
    """Raises InputError where the text that `spec` names, or one given (None), cannot be had; it is not read."""
    _needed(tokenizer, "calibration texts" if spec is None else spec.source)
    if spec is not None and not spec.source.startswith("datasets:"):
        with _text_file(spec) as file:
            file.read(1)


@contextmanager
def _text_file(spec: CalibrationSpec):
    """The open file, whose errors are explained."""
    path = Path(spec.source).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise InputError("the calibration text is no file", place=str(path), remedy="Name a text file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"cannot read the calibration text: {error.strerror}",
            place=str(path),
            remedy='Sources are "self", "random", a text file and "datasets:ID:SPLIT:COLUMN"',
        ) from None


def _read(spec: CalibrationSpec) -> tuple[str, str]:
    if spec.source.startswith("datasets:"):
        # Text enough for 16 characters a token: up to four times what is needed, to spread the windows over.
        return dataset_text(spec.source, enough=16 * spec.samples * spec.sequence_length), spec.source
    path = Path(spec.source).expanduser()
    try:
        with _text_file(spec) as file:
            return file.read().decode("utf-8-sig"), path.name
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", place=str(path), remedy="Convert the file") from None


def text_windows(text: str, tokenizer: Any, length: int, *, place: str, remedy: str) -> Tensor:
    """All windows of a text that do not overlap, in order; what is left at the end is dropped.

    Args:
        length: tokens in a window, with what the tokenizer puts before a text.
        place, remedy: of the errors.

    Returns:
        int64 [n, length].

    Raises:
        InputError: no text, or fewer tokens than one window.
    """
    if not text.strip():
        raise InputError("there is no text in it", place=place)
    start = _start_ids(tokenizer)
    body = length - len(start)
    if body < 1:
        raise InputError(f"{length} tokens leave no room after the {len(start)} that begin every text")
    pieces = tokenizer(_pieces(text), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.from_numpy(np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]))
    count = len(ids) // body
    if not count:
        raise InputError(f"its {len(ids)} tokens are less than one sample of {body}", place=place, remedy=remedy)
    windows = ids[: count * body].view(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), windows], dim=1)


def _windows(text: str, name: str, spec: CalibrationSpec, tokenizer: Any) -> Samples:
    remedy = "Give more text or a smaller sequence_length"
    found = text_windows(text, tokenizer, spec.sequence_length, place=name, remedy=remedy)
    windows = found[_spread(len(found), min(spec.samples, len(found)), spec.seed)]
    asked = "" if len(windows) == spec.samples else f", {spec.samples} asked for"
    described = f"{len(windows)} windows of {spec.sequence_length} tokens from {name} (seed {spec.seed}{asked})"
    return Samples(windows, torch.ones_like(windows), described)


def _pieces(text: str) -> list[str]:
    pieces, begin = [], 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            for mark in ("\n", " "):
                cut = text.rfind(mark, begin + 1, end)
                if cut > 0:
                    # Tokens take the space before a word with them, and the newline after a line.
                    end = cut + (mark == "\n")
                    break
        pieces.append(text[begin:end])
        begin = end
    return pieces


def _spread(count: int, n: int, seed: int) -> Tensor:
    """n of count positions, one at random out of each of n equal stretches."""
    edges = torch.arange(n + 1) * count // n
    chance = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (chance * edges.diff()).long()


def _from_vocabulary(spec: CalibrationSpec, tokenizer: Any, vocab_size: int, generate: Generate | None) -> Samples:
    # An embedding may have more rows than the tokenizer has tokens: those were never trained.
    known = vocab_size if tokenizer is None else min(vocab_size, len(tokenizer))
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    vocab = torch.tensor([token for token in range(known) if token not in special], dtype=torch.int64)
    start = [] if tokenizer is None else _start_ids(tokenizer)
    n, length = spec.samples, spec.sequence_length
    if spec.source == "random":
        generate = _at_random(vocab)
        described = f"{n} sequences of {length} random tokens (seed {spec.seed})"
    elif generate is None:
        raise InputError("the model cannot write its own calibration text here", remedy="Give calibration data")
    else:
        described = f"{n} texts of {length} tokens written by the model (seed {spec.seed})"
    ids = write_text(generate, start, n, length, vocab=vocab, seed=spec.seed, batch_size=_WRITTEN_TOGETHER)
    return Samples(ids, torch.ones_like(ids), described)


def _at_random(vocab: Tensor) -> Generate:
    def generate(input_ids: Tensor, max_new_tokens: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(vocab), (len(input_ids), max_new_tokens), generator=generator)
        return torch.cat([input_ids, vocab[drawn]], dim=1)

    return generate


def _from_data(data: Any, spec: CalibrationSpec, tokenizer: Any) -> Samples:
    if isinstance(data, Mapping):
        if "input_ids" not in data:
            raise InputError("it has no input_ids", place="calibration data", remedy="Give what a tokenizer returns")
        ids = _integers(data["input_ids"], "input_ids")
        mask = _integers(data.get("attention_mask", torch.ones_like(ids)), "attention_mask")
        return _padded_left(ids, mask)
    if isinstance(data, Tensor | np.ndarray):
        ids = _integers(data, "token ids")
        return _padded_left(ids, torch.ones_like(ids))
    if isinstance(data, str) or not isinstance(data, Sequence) or not all(isinstance(text, str) for text in data):
        raise InputError(
            f"{type(data).__name__} is not calibration data",
            remedy="Give a list of strings or token ids [n, S]; the path of a file goes into calibration.source",
        )
    return _from_strings(data, spec, _needed(tokenizer, "calibration texts"))


def _from_strings(texts: Sequence[str], spec: CalibrationSpec, tokenizer: Any) -> Samples:
    if not texts:
        raise InputError("there are no samples", place="calibration texts", remedy="Give at least one")
    rows = [row[: spec.sequence_length] for row in tokenizer(list(texts), verbose=False)["input_ids"]]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not row or not text.strip():
            raise InputError("there is no text in it", place=f"calibration text {index}")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    return Samples(ids, mask, f"{len(rows)} texts of up to {longest} tokens, given")


def _integers(values: Any, what: str) -> Tensor:
    try:
        values = values.cpu() if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError):
        raise InputError(f"{what} are not a table of integers", remedy="Give integers [n, S]") from None
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex() or values.dim() != 2:
        raise InputError(
            f"{what} of {str(values.dtype).removeprefix('torch.')} {list(values.shape)}", remedy="Give integers [n, S]"
        )
    if not values.numel():
        raise InputError("there are no samples", place=what, remedy="Give at least one")
    return values.long()


def _padded_left(ids: Tensor, mask: Tensor) -> Samples:
    if mask.shape != ids.shape or ((mask != 0) & (mask != 1)).any() or not mask.any(dim=1).all():
        raise InputError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}",
            remedy="It holds 1 for tokens and 0 for padding, and at least one token in each row",
        )
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    return Samples(ids * mask, mask, f"{len(ids)} sequences of up to {ids.shape[1]} tokens, given")


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InputError("text needs a tokenizer", place=what, remedy='Give one, token ids, or source "random"')
    return tokenizer


def _start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(plain) + 1):
        if plain and full[begin : begin + len(plain)] == plain:
            return list(full[:begin])
    return []
