"""Capturing what reads pictures, films or sound from a folder, with the head that its config names.

What compares pictures with texts (CLIP) reads both.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..artifact.cache_names import TOKEN_IDS
from ..models.heads import Head, compares, decision_of
from ..models.loading import load_whole
from ..models.source import ModelFolder
from ..models.transformers_witness.encoder import EncoderWitness
from ..models.vision_language import COUNT
from .dynamic import Axes
from .graph import CapturedModel
from .module import capture_module
from .reading import ROWS, reading_of

_PICTURES = "pixel_values"
_TEXTS = ((3, 7), (2, 9))  # rows and tokens of texts beside pictures, of which there are two and then three
_ALIKE = "rows of a batch are of one length: the file has no attention_mask"
_SOUND = "; it reads sound as its extractor makes it"


def capture_features(folder: ModelFolder, head: Head) -> CapturedModel:
    """Capture a model of pictures, films or sound as a module with one input, which is called as in transformers.

    Pictures have the size that the folder's preprocessor_config.json says, or its config. Sound may be of any length,
    spectrograms are of the length that the config says. The batch is dynamic. A model that compares pictures with texts
    has input_ids and, where it takes one, attention_mask [texts, tokens] beside pictures. The weights are in memory as
    a whole.

    Raises:
        CaptureError: it reads something else, torch.export cannot follow it, or the checkpoint does not fit its config.
    """
    loaded = load_whole(folder, head.loader)
    model, name = loaded.model, str(loaded.model.main_input_name)
    both = compares(folder.config)
    name = _PICTURES if both else name
    read = reading_of(model, name, folder, folder.config)
    note = read.note or _ALIKE + (_SOUND if len(read.dims) == 2 else "")
    random = torch.Generator().manual_seed(0)
    calls = [{name: torch.randn(n, *read.example[1:], generator=random)} for n in (read.example[0], ROWS + 1)]
    axes: Axes = {name: {0: COUNT} if both else {i: dim for i, dim in enumerate(read.dims) if isinstance(dim, str)}}
    known: dict[str, Any] = {}
    if both:
        known["vocab_size"] = int(folder.config.get_text_config().vocab_size)
        texts = [_text(model, sizes, known["vocab_size"], random) for sizes in _TEXTS]
        calls = [text | call for text, call in zip(texts, calls, strict=True)]
        axes = {**{text: {0: "num_texts", 1: "sequence_length"} for text in texts[0]}, **axes}
    captured = capture_module(model, calls[0], axes)
    return replace(
        captured, folder=folder, notes=[*loaded.notes, note], left_out=loaded.left_out,
        settings=captured.settings | known | {"task": head.task, "decides": decision_of(head, folder.config)},
        witness=EncoderWitness(folder, head.loader, model, frozenset(), calls),
    )  # fmt: skip


def _text(
    model: PreTrainedModel, sizes: tuple[int, int], vocabulary: int, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """What a model that compares pictures with texts reads of some [texts, tokens], none of them padded."""
    drawn = {TOKEN_IDS: torch.randint(vocabulary, sizes, generator=random)}
    whole = {"attention_mask": torch.ones(sizes, dtype=torch.int64)}
    return drawn | whole if "attention_mask" in inspect.signature(model.forward).parameters else drawn
