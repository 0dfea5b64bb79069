"""The models of a study that are encoder-decoders: prompts are sources, and what is compared is written about them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..artifact import manifest as manifests
from ..artifact.manifest import DECODER, ENCODER, MODEL_FILE
from ..capture.graph import CapturedModel
from ..capture.seq2seq import Parts, capture_seq2seq
from ..errors import InputError
from ..models.source import open_model
from ..runtime.seq2seq import EncoderDecoder, GenerationDefaults, habits_of, is_seq2seq, open_seq2seq, texts_as_source
from ..validation.account import transforms
from ..validation.reference import check_same_model
from .loaded import Asked, Loaded
from .subjects import FLOAT, Subject, check_memory, named_folders


class _AboutSource(ABC):
    """What writes about a source, which a prompt is here."""

    def __init__(self, name: str, start: Sequence[int]):
        self.name, self._start = name, list(start)
        self._source: Sequence[int] = ()

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        self._begin(prompt)
        return self._append(self._start)[-1].numpy()

    def step(self, token: int) -> np.ndarray:
        return self._append([token])[-1].numpy()

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self._begin(prompt)
        return self._append([*self._start, *tokens[:-1]])[-len(tokens) :]

    def _begin(self, prompt: Sequence[int]) -> None:
        if prompt != self._source:
            self._read(prompt)
            self._source = prompt
        self._forget()

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was written."""

    @abstractmethod
    def _read(self, prompt: Sequence[int]) -> None:
        """Let the encoder read a source."""

    @abstractmethod
    def _append(self, tokens: Sequence[int]) -> Tensor:
        """The logits behind each token, float32 [tokens, vocabulary]."""


class PairWriter(_AboutSource):
    """An export in ONNX Runtime."""

    def __init__(self, name: str, pair: EncoderDecoder, start: Sequence[int]):
        super().__init__(name, start)
        self._pair = pair

    def _forget(self) -> None:
        self._pair.decoder.reset()

    def _read(self, prompt: Sequence[int]) -> None:
        self._pair.read(texts_as_source(self._pair, [prompt]))

    def _append(self, tokens: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._pair.decoder.run(np.array([tokens], np.int64))[0].astype(np.float32))


class FloatPairWriter(_AboutSource):
    """transformers' model in PyTorch.

    Args:
        names: of what its encoder reads of a text.
    """

    def __init__(self, name: str, model: Any, start: Sequence[int], names: Sequence[str]):
        super().__init__(name, start)
        self._model, self._names = model, names
        self._heard: Mapping[str, Any] = {}
        self._cache: Any = None

    def _forget(self) -> None:
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _read(self, prompt: Sequence[int]) -> None:
        ids = torch.tensor([list(prompt)])
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = {name: whole[name] for name in self._names}
        with torch.no_grad():
            states = self._model.get_encoder()(**given)
        self._heard = {"encoder_outputs": states} | {n: t for n, t in given.items() if n == "attention_mask"}

    def _append(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            made = self._model(**self._heard, decoder_input_ids=ids, past_key_values=self._cache, use_cache=True)
        return made.logits[0].float()


@contextmanager
def pairs(asked: Asked) -> Iterator[Loaded]:
    """Encoder-decoders, which write about their prompts; in memory inside the `with`.

    Raises:
        InputError, RuntimeProblem: as `study`.
    """
    if isinstance(asked.reference, CapturedModel):
        raise InputError("an encoder-decoder is studied with its folder", remedy="Give the model that was exported")
    subjects, progress = _open_subjects(asked.folders), asked.progress
    parts = capture_seq2seq(open_model(asked.reference, trust_remote_code=asked.trust_remote_code))
    for subject in subjects:
        for part, captured in ((ENCODER, parts.encoder), (DECODER, parts.decoder)):
            place = subject.folder / part
            check_same_model(captured, manifests.load(place), place, transformed=transforms(place))
    size = 4 * sum(parameter.numel() for parameter in parts.model.parameters())
    check_memory(size, subjects)
    origin = parts.encoder.origin
    habits = habits_of(origin.path)
    ids = _sources(parts, asked.texts, asked.longest, habits)
    exports = []
    with parts.whole() as model:
        own = FloatPairWriter(FLOAT, model, habits.start, [port.name for port in parts.encoder.inputs])
        for done, subject in enumerate(subjects):
            progress("load", subject.name, done, len(subjects))
            pair = open_seq2seq(subject.folder, threads=asked.threads, provider=asked.provider)
            exports.append(PairWriter(subject.name, pair, habits.start))
        progress("load", "", len(subjects), len(subjects))
        yield Loaded(origin.name, size, own, exports, subjects, ids, set(habits.ends))


def _open_subjects(folders: Sequence[Any]) -> list[Subject]:
    """The exports; all of them are encoder-decoders.

    Raises:
        InputError: as said, or as `named_folders`.
    """
    found = []
    for name, path in named_folders(folders):
        if not is_seq2seq(path):
            raise InputError(
                "is no encoder-decoder, as others of these are", place=str(path),
                remedy="Give exports of one model",
            )  # fmt: skip
        size = sum(file.stat().st_size for file in path.glob(f"*/{MODEL_FILE}*") if file.is_file())
        found.append(Subject(name, path, manifests.load(path / DECODER), None, size))
    return found


def _sources(parts: Parts, texts: Sequence[str], longest: int, habits: GenerationDefaults) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
        InputError: the model reads no text or has no tokenizer, or a prompt or what is to be written does not fit.
    """
    origin, reads = parts.encoder.origin, parts.encoder.inputs[0].name
    if reads != "input_ids":
        raise InputError(
            f"its sources are {reads}, and the prompts of a study are texts", place=origin.name,
            remedy="`qexport validate` lets both models write about them",
        )  # fmt: skip
    tokenizer = origin.tokenizer()
    if tokenizer is None:
        raise InputError("prompts need a tokenizer", place=origin.name, remedy="Put its files beside the model")
    if habits.longest is not None and len(habits.start) + longest > habits.longest:
        raise InputError(
            f"{longest} new tokens do not fit: the model writes {habits.longest} at most", place="max_new_tokens",
            remedy="Ask for fewer",
        )  # fmt: skip
    context, ids = getattr(origin.config, "max_position_embeddings", None), []
    for text in texts:
        row = tokenizer(text)["input_ids"]
        if context is not None and len(row) > context:
            raise InputError(
                f"{len(row)} tokens do not fit: the model reads {context}", place=f"prompt {text[:40]!r}",
                remedy="Give a shorter prompt",
            )  # fmt: skip
        ids.append(row)
    return ids
