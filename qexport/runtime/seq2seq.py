"""An exported encoder-decoder: the source is read once, then the decoder writes with its cache."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import InputError, RuntimeProblem
from . import manifest as manifests
from .decoder import Decoder
from .manifest import CUDA, DECODER, ENCODER, MANIFEST_FILE, SEQ2SEQ, SOURCE_MASK, read_json
from .session import open_session


def is_seq2seq(folder: str | Path) -> bool:
    """Whether a folder is an export in two parts."""
    path = Path(folder) / MANIFEST_FILE
    return path.is_file() and read_json(path).get("kind") == SEQ2SEQ


def start_token_ids(folder: str | Path) -> list[int]:
    """The tokens that every text of an encoder-decoder begins with, by the configs in its folder.

    Raises:
        InputError: they do not say.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            found |= {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if v is not None}
    first = found.get("decoder_start_token_id", found.get("bos_token_id"))
    if not isinstance(first, int):
        raise InputError("no decoder_start_token_id", place=str(folder), remedy="Write it into generation_config.json")
    forced = found.get("forced_decoder_ids") or []  # pairs of position and token, some of them open
    return [first, *(token for _, token in sorted(forced) if token is not None)]


class EncoderDecoder:
    """The sessions of both parts.

    Attributes:
        inputs: names and types of what the encoder reads.
        decoder: writes, once a source was read.

    Args:
        encoder: session on the first part; decoder: on the second.
    """

    def __init__(self, encoder: ort.InferenceSession, decoder: ort.InferenceSession):
        self._encoder = encoder
        self._device = "cuda" if encoder.get_providers()[0] == CUDA else "cpu"
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
        for name, array in source.items():
            half = self.inputs[name] == "tensor(float16)"
            binding.bind_cpu_input(name, np.ascontiguousarray(array, np.float16 if half else None))
        for name in names:
            binding.bind_output(name, self._device)
        try:
            self._encoder.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has one exception class for each status code and no base class
            raise RuntimeProblem(f"the encoder failed: {error}") from error
        given = dict(zip(names, binding.get_outputs(), strict=True))
        if "attention_mask" in source:
            given[SOURCE_MASK] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(source["attention_mask"]))
        self.decoder.give(given)


def open_seq2seq(folder: str | Path, *, threads: int | None = None, provider: str | None = None) -> EncoderDecoder:
    """Open an export of an encoder-decoder.

    Raises:
        InputError: it is none. Otherwise as `open_session`.
    """
    folder = Path(folder)
    if not is_seq2seq(folder):
        raise InputError("is no export of an encoder-decoder", place=str(folder))
    parts = [folder / ENCODER, folder / DECODER]
    sessions = [open_session(part, manifests.load(part), threads=threads, provider=provider) for part in parts]
    return EncoderDecoder(*sessions)


def read_texts(
    folder: Path, rows: Sequence[Sequence[int]], pad_token_id: int, *, threads: int | None, provider: str | None
) -> Decoder:
    """The decoder of an export, its encoder having read texts.

    Args:
        rows: token ids, one list a text; shorter ones are padded on the right.

    Raises:
        InputError: it reads something else than text, or there is none. Otherwise as `open_seq2seq`.
    """
    pair = open_seq2seq(folder, threads=threads, provider=provider)
    if "input_ids" not in pair.inputs:
        raise InputError(
            f"its encoder reads {', '.join(pair.inputs)}, not text", place=str(folder),
            remedy="In Python: qexport.open_seq2seq(FOLDER), then read() and decoder.generate()",
        )  # fmt: skip
    if not rows or not all(rows):
        raise InputError("there is nothing to read: a text without tokens", remedy="Give at least one token")
    length = max(map(len, rows))
    ids = np.array([[*row, *[pad_token_id] * (length - len(row))] for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
    source = {"input_ids": ids, "attention_mask": mask}
    pair.read({name: source[name] for name in pair.inputs})
    return pair.decoder
