"""Calibration sequences of what a recipe names or a caller passes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...recipe.recipe import CalibrationSpec
from ..self_text import Generate
from .chat import Conversation
from .documents import document_ids
from .registry import Model, needed, source_of
from .samples import Samples, integers, of_rows, padded_left, whole
from .text import MORE, packed_windows


def load_samples(
    spec: CalibrationSpec,
    data: Sequence[str | Conversation] | Tensor | np.ndarray | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    vocab_size: int,
    generate: Generate | None = None,
    together: int = 16,
) -> Samples:
    """The calibration sequences that spec.source names, or those in `data`.

    What sources there are say the files in `kinds`. Of data there are:

    - strings, or conversations as chat templates take them, lists of {"role": ..., "content": ...}: one sequence each,
      all of them, cut after spec.sequence_length tokens, padded on the left to the longest. With spec.packed they are
      joined, the end of a text between, and cut into full windows, all that come out.
    - token ids [n, S] as a tensor or array, or a mapping with input_ids and attention_mask as tokenizers return it: all
      of it; padding is moved to the left.

    The same arguments give the same samples.

    Args:
        tokenizer: a transformers tokenizer; needed for text, used for "self" and "random" where there is one.
        vocab_size: rows of the model's embedding; every id is below it.
        generate: (input_ids int64 [b, t], max_new_tokens, torch.Generator) -> int64 [b, t + max_new_tokens].
        together: the most texts b that it gets.

    Raises:
        InputError: no such file or data set column, text that is not UTF-8, empty, or shorter than one sequence, no
            sequences, ids outside the vocabulary, a missing tokenizer, chat template, generate or package.
        NumericsError: the model writes NaN.
    """
    if data is not None:
        samples = _from_data(data, spec, tokenizer)
    else:
        found = source_of(spec)
        if found.tokenizes:
            needed(tokenizer, found.name)
        samples = found.samples(Model(tokenizer, vocab_size, generate, together))
    outside = samples.input_ids[(samples.input_ids < 0) | (samples.input_ids >= vocab_size)]
    if len(outside):
        raise InputError(
            f"token id {int(outside[0])} is outside the model's vocabulary of {vocab_size}",
            place=samples.described,
            remedy="Use the tokenizer that belongs to the model",
        )
    return samples


def check_source(spec: CalibrationSpec | None, tokenizer: Any) -> None:
    """Raises InputError where what `spec` names, or text that is given (None), cannot be had; it is not read."""
    if spec is None:
        needed(tokenizer, "calibration texts")
        return
    found = source_of(spec)
    if found.tokenizes:
        needed(tokenizer, found.name)
    found.check()


def _from_data(data: Any, spec: CalibrationSpec, tokenizer: Any) -> Samples:
    if isinstance(data, Mapping):
        if "input_ids" not in data:
            raise InputError("it has no input_ids", place="calibration data", remedy="Give what a tokenizer returns")
        ids = integers(data["input_ids"], "input_ids")
        return _given(ids, integers(data.get("attention_mask", torch.ones_like(ids)), "attention_mask"))
    if isinstance(data, Tensor | np.ndarray):
        ids = integers(data, "token ids")
        return _given(ids, torch.ones_like(ids))
    conversations = isinstance(data, Sequence) and bool(data) and all(_is_conversation(item) for item in data)
    texts = not isinstance(data, str) and isinstance(data, Sequence) and all(isinstance(text, str) for text in data)
    if not texts and not conversations:
        raise InputError(
            f"{type(data).__name__} is not calibration data",
            remedy="Give a list of strings or token ids [n, S]; the path of a file goes into calibration.source",
        )
    return _from_documents(data, spec, needed(tokenizer, "calibration texts"))


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and all(isinstance(turn, Mapping) for turn in item)


def _given(ids: Tensor, mask: Tensor) -> Samples:
    return padded_left(ids, mask, f"{len(ids)} sequences of up to {ids.shape[1]} tokens, given")


def _from_documents(documents: Sequence[Any], spec: CalibrationSpec, tokenizer: Any) -> Samples:
    if not documents:
        raise InputError("there are no samples", place="calibration texts", remedy="Give at least one")
    rows = [document_ids(tokenizer, item, f"calibration text {index}") for index, item in enumerate(documents)]
    if spec.packed:
        found = packed_windows(rows, tokenizer, spec.sequence_length, place="calibration texts", remedy=MORE)
        described = f"{len(found)} windows of {spec.sequence_length} tokens, packed of {len(rows)} texts, given"
        return whole(found, described)
    return of_rows([row[: spec.sequence_length] for row in rows], f"{len(rows)} texts of up to {{}} tokens, given")
