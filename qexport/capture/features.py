"""Capturing what reads pictures, films or sound from a folder, with the head that its config names.

What compares pictures with texts (CLIP) reads both.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..models.heads import Head, compares, decision_of
from ..models.loading import load_whole
from ..models.source import ModelFolder
from ..models.transformers_witness.encoder import EncoderWitness
from ..models.vision_language import COUNT
from .graph import CapturedModel
from .module import capture_module
from .reading import ROWS, reading_of

IDS, _PICTURES = "input_ids", "pixel_values"
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
    read = reading_of(model, _PICTURES if both else name, folder, folder.config)
    note = read.note or _ALIKE + (_SOUND if len(read.dims) == 2 else "")
    random = torch.Generator().manual_seed(0)
    calls, axes = [], {_PICTURES if both else name: _free(read.dims)}
    for rows in (read.example[0], ROWS + 1):
        calls.append({name: torch.randn(rows, *read.example[1:], generator=random) for name in axes})
    texts, tokens = (_texts(model), int(folder.config.get_text_config().vocab_size)) if both else ([], 0)
    for call, sizes in zip(calls, _TEXTS, strict=True):
        drawn = {name: torch.ones(sizes, dtype=torch.int64) for name in texts}
        call |= drawn | {IDS: torch.randint(tokens, sizes, generator=random)} if both else {}
    if both:
        axes = {_PICTURES: {0: COUNT}, **{name: {0: "num_texts", 1: "sequence_length"} for name in texts}}
    captured = capture_module(model, {name: calls[0][name] for name in [*texts, *axes]}, axes)
    known = {"vocab_size": tokens} if both else {}
    return replace(
        captured, folder=folder, notes=[*loaded.notes, note], left_out=loaded.left_out,
        settings=captured.settings | known | {"task": head.task, "decides": decision_of(head, folder.config)},
        witness=EncoderWitness(folder, head.loader, model, frozenset(), calls),
    )  # fmt: skip


def _free(dims: Sequence[int | str]) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(dims) if isinstance(dim, str)}


def _texts(model: PreTrainedModel) -> list[str]:
    """Inputs of a model that compares pictures with texts, but for pictures."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in (IDS, "attention_mask") if name in taken]
