"""Capturing a model that reads pictures and text together as three: encoder, embedding that merges, decoder.

The encoder reads pictures and knows no text; the embedding puts its rows of features where tokens stand for them; the
decoder reads the result with a cache, in which there is no difference any more between what was a picture and what was
text.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel

from ..artifact.manifest import DECODER, EMBEDDING, VISION
from ..device import HOST, Placement
from ..errors import CaptureError
from ..models.loading import Loaded, load_whole
from ..models.source import ModelFolder
from ..models.tokens import embedding_rows
from ..models.transformers_witness.pictures import PicturesWitness
from ..models.vision_language import VisionLanguage, vision_language_of
from .another_forward import called_by
from .decoder import capture_decoder
from .dynamic import Axes
from .graph import BATCH, CapturedModel
from .module import capture_module
from .streamed import Streamed, StreamedWeights, open_streamed
from .trace import Reads

FEATURES, MERGED, ROWS = "image_features", "inputs_embeds", "num_image_tokens"
# Sizes of the example inputs; see `trace`.
_COUNT, _BATCH, _SEQUENCE, _ROWS = 2, 2, 7, 5


@dataclass(frozen=True)
class VisionParts:
    """A model that reads pictures and text, in three.

    Attributes:
        kind: its architecture.
        vision: from pictures to image_features [rows, hidden].
        embedding: from input_ids [batch, sequence] and image_features to inputs_embeds [batch, sequence, hidden], and
            to what else the decoder reads of some architectures.
        decoder: from inputs_embeds, attention_mask, position_ids and past_key_values.{i}.key/value to logits and
            present.{i}.key/value.
        model: the float model of transformers, for texts that it writes; None where it is too large to be loaded whole.
    """

    kind: VisionLanguage
    vision: CapturedModel
    embedding: CapturedModel
    decoder: CapturedModel
    model: PreTrainedModel | None

    @property
    def config(self) -> PretrainedConfig:
        """Of the whole model."""
        return self.decoder.origin.config

    @property
    def by_name(self) -> dict[str, CapturedModel]:
        """All of them, by the names of their folders."""
        return {VISION: self.vision, EMBEDDING: self.embedding, DECODER: self.decoder}


def capture_vision_language(folder: ModelFolder, placement: Placement = HOST) -> VisionParts:
    """Capture the parts of a model of pictures and text.

    The weights of the decoder stay in the checkpoint, and those of the others too where the model is large.

    Args:
        placement: where blocks of all are to be computed.

    Raises:
        CaptureError: it is of an architecture that is not known, torch.export cannot follow it, or the checkpoint does
            not fit its config.
    """
    kind = vision_language_of(folder.config)
    if kind is None:
        raise CaptureError(
            f"{folder.config.model_type} is not a known architecture for pictures and text", place=folder.name,
            remedy="Pass an nn.Module with example inputs",
        )  # fmt: skip
    loaded: Loaded | Streamed = open_streamed(folder, kind.loader) or load_whole(folder, kind.loader)
    made = _in_front(loaded, kind, folder)
    if made is None:
        loaded = load_whole(folder, kind.loader)
        made = _in_front(loaded, kind, folder)
    if made is None:
        raise TypeError("weights that were loaded are no fake ones")
    vision, embedding = made
    model = loaded.model if isinstance(loaded, Loaded) else None
    witness = PicturesWitness(folder, kind, model)
    own = replace(folder, config=deepcopy(folder.config))  # in which it says how attention is traced
    decoder = capture_decoder(own, kind.loader, partial(_reads, kind), replace(witness, part=DECODER))
    parts = {
        name: replace(
            part, witness=replace(witness, part=name), placement=placement, folder=folder, left_out=[],
            settings=part.settings | {"part": name},
        )
        for name, part in ((VISION, vision), (EMBEDDING, embedding), (DECODER, decoder))
    }  # fmt: skip
    parts[VISION] = replace(parts[VISION], notes=[*loaded.notes, *vision.notes], left_out=loaded.left_out)
    return VisionParts(kind, **parts, model=model)


def _in_front(
    loaded: Loaded | Streamed, kind: VisionLanguage, folder: ModelFolder
) -> tuple[CapturedModel, CapturedModel] | None:
    """The parts in front of the decoder; None where a graph computes with weights alone, and these are not loaded.

    Raises:
        CaptureError: torch.export cannot follow them, or weights are missing.
    """
    if loaded.absent:
        raise CaptureError(
            f"{len(loaded.absent)} weights are not in the checkpoint, first {loaded.absent[0]}", place=folder.name,
            remedy="The config does not belong to these weights, or the download is incomplete",
        )  # fmt: skip
    config, random = folder.config, torch.Generator().manual_seed(0)
    pictures = kind.example(config, _COUNT, random)
    free = {
        name: {axis: dim for axis, dim in enumerate(given.dims) if isinstance(dim, str)}
        for name, given in kind.inputs(config).items()
    }
    vision = _captured(loaded, pictures, free, lambda model, given: {FEATURES: kind.features(model, given)})
    if vision is None:
        return None
    width = int(vision.outputs[0].dims[-1])
    tokens = {
        "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64), FEATURES: torch.zeros(_ROWS, width)
    }  # fmt: skip
    axes = {"input_ids": {0: BATCH, 1: "sequence_length"}, FEATURES: {0: ROWS}}
    embedding = _captured(loaded, tokens, axes, partial(_merged, kind))
    return None if embedding is None else (vision, embedding)


def _captured(
    loaded: Loaded | Streamed, given: Mapping[str, Tensor], axes: Axes, run: Callable[..., dict[str, Tensor]]
) -> CapturedModel | None:
    """A part that is called by `run`; None where it computes with weights that are not loaded."""
    fake = loaded.fake if isinstance(loaded, Streamed) else None
    with called_by(loaded.model, list(given), run):
        captured = capture_module(loaded.model, given, axes, fake=fake)
    if not isinstance(loaded, Streamed):
        return captured
    held = {n: b.detach() for n, b in loaded.model.named_buffers(remove_duplicate=False)}
    held |= getattr(captured.weights, "made", {})
    if any(isinstance(tensor, FakeTensor) for tensor in held.values()):
        return None
    return replace(captured, weights=StreamedWeights(loaded.checkpoint, held))


def _merged(kind: VisionLanguage, model: PreTrainedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of tokens, and rows of features, in order, where a token stands for one; what belongs to them."""
    ids, rows, token = given["input_ids"], given[FEATURES], kind.token(model.config)
    there = ids == token
    known = ids if token < embedding_rows(model) else torch.where(there, 0, ids)
    found = model.get_input_embeddings()(known)
    place = torch.where(there, there.flatten().long().cumsum(0).view(ids.shape), 0)
    # A row in front, so that a text without pictures has one to look at.
    table = torch.cat([torch.zeros(1, rows.shape[-1]), rows])
    width, looked = found.shape[-1], table[place]
    merged = torch.where(there[..., None], looked[..., :width], found)
    return {MERGED: merged, **kind.besides(model, known, there, looked[..., width:])}


def _reads(kind: VisionLanguage, model: PreTrainedModel) -> Reads:
    config = model.config
    width = config.get_text_config().hidden_size
    return Reads(
        (MERGED, (BATCH, "sequence_length", width)), kind.positions, kind.others(config), kind.decode
    )  # fmt: skip
