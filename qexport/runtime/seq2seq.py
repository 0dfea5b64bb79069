"""An exported encoder-decoder: the source is read once, then the decoder writes with its cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact import manifest as manifests
from ..artifact.files import read_json
from ..artifact.manifest import DECODER, ENCODER, MANIFEST_FILE, SEQ2SEQ, SOURCE_MASK, stated
from ..artifact.output import restore
from ..errors import InputError, RuntimeProblem
from .decoder import Decoder, Generation
from .provider import device_of
from .sampling import Sampling
from .session import open_session
from .speech import Speech, SpeechTokens, speech_tokens
from .values import picked, value_of


def is_seq2seq(folder: str | Path) -> bool:
    """Whether a folder is an export in two parts."""
    restore(Path(folder))
    path = Path(folder) / MANIFEST_FILE
    return path.is_file() and read_json(path).get("kind") == SEQ2SEQ


_MASK = "attention_mask"
# What a generation config may say besides of what is written, and what says nothing.
_RULES = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "bad_words_ids": None, "sequence_bias": None, "exponential_decay_length_penalty": None,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationDefaults:
    """How an encoder-decoder writes, by the configs in its folder.

    Attributes:
        start: tokens that every text begins with; ends: any of these ends one; pad: fills up behind the end.
        never: tokens that are never written; never_first: nor these as the first new one.
        longest: tokens of a text with what it begins with at most; None where nothing says so.
        beams: texts that are followed at once.
        rules: names of further rules that the config has for what is written.
        speech: of models of speech, the tokens that say language, task and times.
    """

    start: tuple[int, ...]
    ends: tuple[int, ...] = ()
    pad: int = 0
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    longest: int | None = None
    beams: int = 1
    rules: tuple[str, ...] = ()
    speech: SpeechTokens | None = None


def longest_text(said: Mapping[str, Any]) -> int | None:
    """Tokens that a decoder reads at most, by what its configs say; None where they do not."""
    configs = (said, *(said.get(part) for part in ("decoder_config", "decoder")))  # of the whole, or of a part of it
    names = ("max_target_positions", "max_position_embeddings")
    sizes = (config.get(name) for config in configs if isinstance(config, Mapping) for name in names)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def habits_of(folder: str | Path) -> GenerationDefaults:
    """Read them from generation_config.json, or from config.json what that does not say.

    Raises:
        InputError: they do not say how texts begin, or are no JSON objects.
    """
    found = stated(folder)
    first = found.get("decoder_start_token_id", found.get("bos_token_id"))
    if not isinstance(first, int):
        raise InputError("no decoder_start_token_id", place=str(folder), remedy="Write it into generation_config.json")
    forced = found.get("forced_decoder_ids") or []  # pairs of position and token, some of them open
    start = (first, *(token for _, token in sorted(forced) if token is not None))
    ends, pad = found.get("eos_token_id", ()), found.get("pad_token_id", 0)
    path = Path(folder) / "generation_config.json"
    own = {key: value for key, value in read_json(path).items() if value is not None} if path.is_file() else found
    beams = own.get("num_beams", 1)
    return GenerationDefaults(
        start, tuple(ends) if isinstance(ends, list | tuple) else (ends,), pad,
        tuple(found.get("suppress_tokens", ())), tuple(found.get("begin_suppress_tokens", ())),
        longest_text(found), beams if isinstance(beams, int) and beams > 0 else 1,
        tuple(key for key, without in _RULES.items() if own.get(key, without) != without), speech_tokens(found),
    )  # fmt: skip


class EncoderDecoder:
    """The sessions of both parts.

    Attributes:
        inputs: names and types of what the encoder reads.
        habits: how it writes.
        decoder: writes, once a source was read.

    Args:
        folder: of the export, with the configs.
        encoder: session on the first part; decoder: on the second.
    """

    def __init__(self, folder: Path, encoder: ort.InferenceSession, decoder: ort.InferenceSession):
        self._folder, self._encoder, self.habits = folder, encoder, habits_of(folder)
        self._device = device_of(encoder)
        self.inputs = {value.name: value.type for value in encoder.get_inputs()}
        self._sizes = {value.name: value.shape for value in encoder.get_inputs()}
        self.decoder = Decoder(decoder)
        self._read: Mapping[str, ort.OrtValue] = {}

    def read(self, source: Mapping[str, np.ndarray]) -> None:
        """Read a batch of sources; what the decoder writes from now on is about them.

        Args:
            source: by name of the encoder's inputs: input_ids and attention_mask, int64 [batch, source], or
                input_features or input_values of sound, [batch, ...], of which nothing is padding without a mask.

        Raises:
            InputError: another input than these.
            RuntimeProblem: ONNX Runtime fails.
        """
        sound = self.inputs.keys() - {"input_ids", _MASK}
        if _MASK in self.inputs and source.keys() == sound:
            source = {**source, _MASK: np.ones(next(iter(source.values())).shape[:2], np.int64)}
        if self.inputs.keys() != source.keys():
            raise InputError(f"the source has {', '.join(source)}, but the encoder reads {', '.join(self.inputs)}")
        binding, names = self._encoder.io_binding(), [value.name for value in self._encoder.get_outputs()]
        values = {name: value_of(array, self.inputs[name]) for name, array in source.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self._device)
        try:
            self._encoder.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has one exception class for each status code and no base class
            raise RuntimeProblem(f"the encoder failed: {error}") from error
        given = dict(zip(names, binding.get_outputs(), strict=True))
        if _MASK in source:  # of text; an encoder of sound makes fewer places of it, and says which
            given.setdefault(SOURCE_MASK, values[_MASK])
        self._read = given
        self.decoder.give(given)

    def _spread(self, beams: int) -> None:
        """Let the decoder have several rows for each source, one after another."""
        rows = [row for row in range(next(iter(self._read.values())).shape()[0]) for _ in range(beams)]
        self.decoder.give({
            name: picked(value, rows, value.element_type(), self._device) for name, value in self._read.items()
        })  # fmt: skip

    def write(
        self,
        source: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int,
        prompts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        on_token: Callable[[int, int], None] | None = None,
        beams: int | None = None,
        speech: Speech | None = None,
    ) -> Generation:
        """Write about a batch of sources, as the model's configs say that it writes.

        Args:
            source: see `read`.
            prompts: token ids that the texts begin with, one list a row, all of one length, in the place of those that
                the configs name.
            max_new_tokens, sampling, on_token: see `Decoder.generate`.
            beams: texts that are followed at once for each source, of which the likeliest is written; None: as many as
                the configs say. Tokens are known when a text is whole.
            speech: of a model of speech, how it is to be written down.

        Raises:
            InputError: as `read` and `Decoder.generate`; beams that are drawn, or none; speech, and another kind of
                model, or a language that it does not have.
            RuntimeProblem: as `read`.
        """
        habits, rows = self.habits, len(next(iter(source.values()), ()))
        if not rows:
            raise InputError("there is no source to write about", place="source", remedy="Give at least one source")
        if beams is not None and (beams < 1 or (beams > 1 and sampling is not None)):
            raise InputError(
                "beams search for the likeliest text and cannot sample" if sampling else f"{beams} beams are too few",
                place="beams", remedy="Leave out the sampling" if sampling else "Take 1 or more",
            )  # fmt: skip
        if speech is not None and habits.speech is None:
            raise InputError(
                "the model has no languages or timestamps of speech", place="speech", remedy="Leave it out"
            )
        beams = beams or (habits.beams if sampling is None else 1)
        timed = speech is not None and speech.timestamps
        if timed and sampling is not None:
            raise InputError("timestamps cannot be sampled", place="timestamps", remedy="Leave out the sampling")
        self.read(source)
        if prompts is None and habits.speech is not None:
            prompts = habits.speech.beginnings(speech or Speech(), habits.start[0], rows, self._hears)
        prompts = [habits.start] * rows if prompts is None else prompts
        if habits.longest is not None:
            if habits.longest <= len(prompts[0]):
                raise InputError(
                    f"its {len(prompts[0])} tokens leave no room: the model reads at most {habits.longest}",
                    place="start", remedy="Give fewer",
                )  # fmt: skip
            max_new_tokens = min(max_new_tokens, habits.longest - len(prompts[0]))
        if sampling is None and (beams > 1 or timed or habits.rules):
            return self._search(source, prompts, beams, max_new_tokens, timed, on_token)
        return self.decoder.generate(
            prompts, max_new_tokens=max_new_tokens, eos_token_ids=habits.ends, pad_token_id=habits.pad,
            sampling=sampling, on_token=on_token, never=habits.never, never_first=habits.never_first,
        )  # fmt: skip

    def any_source(self, rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
        """Sources without a meaning, to measure speed with.

        Args:
            length: tokens of each, where they are texts of a vocabulary; of sound of any length frames or samples.
        """
        random = np.random.default_rng(0)
        for name in self.inputs.keys() - {"input_ids", _MASK}:
            sizes = [size if isinstance(size, int) else length for size in self._sizes[name][1:]]
            return {name: random.standard_normal((rows, *sizes)).astype(np.float32)}
        return texts_as_source(self, random.integers(0, vocabulary, (rows, length)).tolist())

    def _hears(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits behind prompts of one length."""
        self.decoder.reset()
        return self.decoder.run(np.array(prompts))[:, -1]

    def _search(
        self, source: Mapping[str, np.ndarray], prompts: Sequence[Sequence[int]], beams: int, most: int, timed: bool,
        on_token: Callable[[int, int], None] | None,
    ) -> Generation:  # fmt: skip
        """Write by all rules of the configs."""
        from .search import search  # which takes torch: imported where it is needed, and nowhere else

        self._spread(beams)
        found = search(
            self.decoder, self._folder, prompts, source=source.get("input_ids"), beams=beams, max_new_tokens=most,
            timestamps=timed,
        )  # fmt: skip
        if on_token:
            for row, text in enumerate(found.tokens):
                for token in text:
                    on_token(row, token)
        return found


def open_seq2seq(folder: str | Path, *, threads: int | None = None, provider: str | None = None) -> EncoderDecoder:
    """Open an export of an encoder-decoder.

    Raises:
        InputError: it is none. Otherwise as `open_session`.
    """
    folder = Path(folder)
    if not is_seq2seq(folder):
        raise InputError("is not an export of an encoder-decoder", place=str(folder))
    encoder, decoder = (
        open_session(part, manifests.load(part), threads=threads, provider=provider)
        for part in (folder / ENCODER, folder / DECODER)
    )
    return EncoderDecoder(folder, encoder, decoder)


def texts_as_source(pair: EncoderDecoder, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """What the encoder of an export reads of texts.

    Args:
        rows: token ids, one list a text; shorter ones are padded on the right.

    Raises:
        InputError: it reads something else than text, or there is none.
    """
    if "input_ids" not in pair.inputs:
        raise InputError(
            f"its encoder reads {', '.join(pair.inputs)}, not text",
            remedy="In Python: qexport.generate(FOLDER, inputs={name: array})",
        )
    if not rows or not all(rows):
        raise InputError("there is nothing to read: a text without tokens", remedy="Give at least one token")
    length = max(map(len, rows))
    ids = np.array([[*row, *[pair.habits.pad] * (length - len(row))] for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
    source = {"input_ids": ids, "attention_mask": mask}
    return {name: source[name] for name in pair.inputs}
