"""An exported encoder-decoder: the source is read once, then the decoder writes with its cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from .values import value_of


def is_seq2seq(folder: str | Path) -> bool:
    """Whether a folder is an export in two parts."""
    restore(Path(folder))
    path = Path(folder) / MANIFEST_FILE
    return path.is_file() and read_json(path).get("kind") == SEQ2SEQ


@dataclass(frozen=True)
class GenerationDefaults:
    """How an encoder-decoder writes, by the configs in its folder.

    Attributes:
        start: tokens that every text begins with; ends: any of these ends one; pad: fills up behind the end.
        never: tokens that are never written; never_first: nor these as the first new one.
    """

    start: tuple[int, ...]
    ends: tuple[int, ...] = ()
    pad: int = 0
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()


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
    return GenerationDefaults(
        start, tuple(ends) if isinstance(ends, list | tuple) else (ends,), pad,
        tuple(found.get("suppress_tokens", ())), tuple(found.get("begin_suppress_tokens", ())),
    )  # fmt: skip


class EncoderDecoder:
    """The sessions of both parts.

    Attributes:
        inputs: names and types of what the encoder reads.
        habits: how it writes.
        decoder: writes, once a source was read.

    Args:
        encoder: session on the first part; decoder: on the second.
    """

    def __init__(self, encoder: ort.InferenceSession, decoder: ort.InferenceSession, habits: GenerationDefaults):
        self._encoder, self.habits = encoder, habits
        self._device = device_of(encoder)
        self.inputs = {value.name: value.type for value in encoder.get_inputs()}
        self.decoder = Decoder(decoder)

    def read(self, source: Mapping[str, np.ndarray]) -> None:
        """Read a batch of sources; what the decoder writes from now on is about them.

        Args:
            source: by name of the encoder's inputs: input_ids and attention_mask, int64 [batch, source], or
                input_features.

        Raises:
            InputError: another input than these.
            RuntimeProblem: ONNX Runtime fails.
        """
        if self.inputs.keys() != source.keys():
            raise InputError(f"the source has {', '.join(source)}, and the encoder reads {', '.join(self.inputs)}")
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
        if "attention_mask" in source:
            given[SOURCE_MASK] = values["attention_mask"]
        self.decoder.give(given)

    def write(
        self,
        source: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int,
        prompts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Write about a batch of sources, as the model's configs say that it writes.

        Args:
            source: see `read`.
            prompts: token ids that the texts begin with, one list a row, all of one length, in the place of those that
                the configs name: for Whisper language and task, say.
            max_new_tokens, sampling, on_token: see `Decoder.generate`.

        Raises: as `read` and `Decoder.generate`.
        """
        self.read(source)
        rows = len(next(iter(source.values())))
        return self.decoder.generate(
            [self.habits.start] * rows if prompts is None else prompts, max_new_tokens=max_new_tokens,
            eos_token_ids=self.habits.ends, pad_token_id=self.habits.pad, sampling=sampling, on_token=on_token,
            never=self.habits.never, never_first=self.habits.never_first,
        )  # fmt: skip


def open_seq2seq(folder: str | Path, *, threads: int | None = None, provider: str | None = None) -> EncoderDecoder:
    """Open an export of an encoder-decoder.

    Raises:
        InputError: it is none. Otherwise as `open_session`.
    """
    folder = Path(folder)
    if not is_seq2seq(folder):
        raise InputError("is no export of an encoder-decoder", place=str(folder))
    encoder, decoder = (
        open_session(part, manifests.load(part), threads=threads, provider=provider)
        for part in (folder / ENCODER, folder / DECODER)
    )
    return EncoderDecoder(encoder, decoder, habits_of(folder))


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
