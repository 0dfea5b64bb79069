"""Capturing an encoder-decoder (T5, BART, Whisper and their like) as two models, one of which hands on to the other.

What the decoder's cross-attention reads is the same for every token that is written, so the first model makes it, once:
encoder, and the projections of its result to keys and values for every layer of the decoder. The second is the rest of
the decoder, with a cache of its own tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

from ..artifact.manifest import DECODER, ENCODER, SOURCE_MASK, SPECTRA, STATES
from ..device import HOST, Placement
from ..errors import CaptureError, root_cause
from ..models.checkpoint import StateDict
from ..models.layerwise import open_layerwise
from ..models.loading import Loaded, load_whole
from ..models.quiet import quiet_transformers
from ..models.source import ModelFolder
from ..models.source_mask import telling_decoder
from ..models.steps import WITHOUT_CACHE
from ..models.transformers_witness.encoder_decoder import PartWitness
from .another_forward import called_by
from .attention import IMPLEMENTATION, GivenCache, GraphCache, ProbeCache, tracing
from .graph import BATCH, CapturedModel, Port
from .module import capture_module
from .reading import ROWS, Reading, reading_of
from .streamed import Streamed, StreamedWeights, open_streamed
from .whole_numbers import whole_numbers_of_sizes
from .windowed_attention import windows_as_masks

# Sizes of the example inputs; see `trace`.
_SOURCE, _SEQUENCE, _PAST = 7, 3, 5
_TEXT = Reading((BATCH, "encoder_sequence_length"), (ROWS, _SOURCE))
_CACHE = ("key", "value")
# Their decoders have a causal mask where there is no cache alone: tokens of one call would see those behind them.
_SEE_AHEAD = ("fsmt",)
_OF_PICTURES = ("vision-encoder-decoder",)  # of the models that write about pictures those with two parts


@dataclass(frozen=True)
class Parts:
    """An encoder-decoder in two.

    Attributes:
        encoder: from the source to cross_key_values.{i}.key/value, [batch, heads, places, width] for every layer of
            the decoder; of sound of any length also encoder_attention_mask, which of these places are no padding,
            int64 [batch, places]; of spectrograms of one length encoder_hidden_states, which onnxruntime-genai binds.
        decoder: from input_ids, past_key_values.{i}.key/value, cross_key_values.{i}.key/value and, where the source may
            be of any length, encoder_attention_mask to logits and present.{i}.key/value.
        model: transformers' model; of a large one without its weights, see `whole`.
        loader: an auto class of transformers that loads it.
        streamed: its weights are read from the checkpoint when they are wanted.
    """

    encoder: CapturedModel
    decoder: CapturedModel
    model: PreTrainedModel
    loader: type[Any]
    streamed: bool = False

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The float model to run, for the texts that it writes; what the blocks are calibrated on needs no other.

        A large one is in memory inside the `with` where it takes half of what is free, and reads the weights of one
        module at a time elsewhere.
        """
        if not self.streamed:
            yield self.model
            return
        size = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        if size <= psutil.virtual_memory().available // 2:
            yield load_whole(self.encoder.origin, self.loader).model
        else:
            yield open_layerwise(self.loader, self.encoder.origin)[0]


def capture_seq2seq(folder: ModelFolder, placement: Placement = HOST) -> Parts:
    """Capture the encoder-decoder of a folder; the weights of a large one stay in its checkpoint.

    Args:
        placement: where blocks of both are to be computed.

    Raises:
        CaptureError: it reads neither text nor sound, torch.export cannot follow it, or the checkpoint does not
            fit its config.
    """
    loader = _loader(folder)
    streamed = open_streamed(folder, loader)
    if streamed is not None and not streamed.absent:
        found = _captured(folder, loader, streamed, placement)
        made = [_made(part) for part in (found.encoder, found.decoder)]
        held = {n: b.detach() for n, b in streamed.model.named_buffers(remove_duplicate=False)}
        if not any(isinstance(tensor, FakeTensor) for tensors in (held, *made) for tensor in tensors.values()):
            encoder, decoder = (
                replace(part, weights=StreamedWeights(streamed.checkpoint, held | tensors))
                for part, tensors in zip((found.encoder, found.decoder), made, strict=True)
            )
            return replace(found, encoder=encoder, decoder=decoder, streamed=True)
    return _captured(folder, loader, load_whole(folder, loader), placement)


def _made(captured: CapturedModel) -> dict[str, Tensor]:
    """Weights that the graph has and the model has not: computed of others when it was captured."""
    return dict(captured.weights.made) if isinstance(captured.weights, StateDict) else {}


def _captured(folder: ModelFolder, loader: type[Any], loaded: Loaded | Streamed, placement: Placement) -> Parts:
    model, fake = loaded.model, loaded.fake if isinstance(loaded, Streamed) else None
    source, axes = _example(model, folder)
    own = model.config._attn_implementation
    with windows_as_masks(model), whole_numbers_of_sizes(model):
        layers, mask, width = _layers(model, source, fake)
        with _called_by(model, list(source), _encode):
            encoder = capture_module(model, source, axes, fake=fake)
    tokens, names = _tokens(layers, mask)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with _called_by(model, list(tokens), partial(_decode, width)):
            decoder = capture_module(model, tokens, {name: _axes(name) for name in tokens}, fake=fake)
    except CaptureError as error:
        error.remedy = f"{error.remedy}. {WITHOUT_CACHE}" if error.remedy else WITHOUT_CACHE
        raise
    except ValueError as error:
        why = f"attention of a form that has no lowering: {root_cause(error)}"
        raise CaptureError(why, place=folder.name) from error
    finally:
        model.set_attn_implementation(own)
    encoder, decoder = (
        replace(
            part, placement=placement,
            witness=PartWitness(folder, loader, None if fake else model, source, decodes=part is decoder),
        )
        for part in (encoder, decoder)
    )
    encoder = replace(encoder, notes=[*loaded.notes], left_out=loaded.left_out)
    return Parts(_part(encoder, ENCODER, folder, {}), _part(decoder, DECODER, folder, names), model, loader)


def _loader(folder: ModelFolder) -> type[Any]:
    """The class of transformers that loads it."""
    kind = folder.config.model_type
    if kind in _SEE_AHEAD:
        raise CaptureError(
            f"the decoder of {kind} has no causal mask where it has a cache", place=folder.name, remedy=WITHOUT_CACHE
        )
    if kind in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return AutoModelForSpeechSeq2Seq
    if kind in _OF_PICTURES:
        return AutoModelForImageTextToText
    if kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    raise CaptureError(
        f"transformers has no encoder-decoder of type {kind} that writes text", place=folder.name,
        remedy="For other kinds of model pass an nn.Module and example inputs",
    )  # fmt: skip


def _example(model: PreTrainedModel, folder: ModelFolder) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """A source to trace with, and which of its dimensions are free; what may be of any length has a mask."""
    name = getattr(model.get_encoder(), "main_input_name", model.main_input_name)
    config = getattr(model.config, "encoder", model.config)
    read = _TEXT if name == "input_ids" else reading_of(model, name, folder, config)
    source = {name: torch.zeros(read.example) if read is not _TEXT else torch.ones(read.example, dtype=torch.int64)}
    if read is _TEXT or read.free:
        source["attention_mask"] = torch.ones(read.example[:2], dtype=torch.int64)
    free = {axis: dim for axis, dim in enumerate(read.dims) if isinstance(dim, str)}
    return source, {name: {axis: dim for axis, dim in free.items() if axis < t.dim()} for name, t in source.items()}


def _axes(name: str) -> dict[int, str]:
    """The free dimensions of an input of the decoder."""
    if name.startswith("past_"):
        return {0: BATCH, 2: "past_sequence_length"}
    if name.startswith("cross_"):
        return {0: BATCH, 2: "encoder_sequence_length"}
    return {0: BATCH, 1: "sequence_length" if name == "decoder_input_ids" else "encoder_sequence_length"}


def _called_by(model: PreTrainedModel, names: Sequence[str], run: Callable):
    """See `called_by`; names have two underscores for the dots that those of `run` have."""
    return called_by(
        model, names, lambda model, given: run(model, {name.replace("__", "."): t for name, t in given.items()})
    )


def _call(model: PreTrainedModel, cache: EncoderDecoderCache, **inputs):
    return type(model).forward(model, **inputs, past_key_values=cache, use_cache=True)


def _first_step(
    model: PreTrainedModel, source: Mapping[str, Tensor]
) -> tuple[ProbeCache, ProbeCache, Tensor | None, Tensor]:
    """What a first token puts into the decoder's two caches, which places of the source are no padding, int64 [batch,
    places], where anything says so, and what the encoder makes."""
    own, cross = ProbeCache(), ProbeCache()
    token = torch.zeros(next(iter(source.values())).shape[0], 1, dtype=torch.int64)
    with telling_decoder(model) as said:
        made = _call(model, EncoderDecoderCache(own, cross), **source, decoder_input_ids=token)
    return own, cross, said[0].to(torch.int64) if said else None, made.encoder_last_hidden_state


def _encode(model: PreTrainedModel, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _, cross, mask, states = _first_step(model, source)
    found = {
        f"cross_key_values.{i}.{part}": tensor
        for i, both in sorted(cross.found.items())
        for part, tensor in both.items()
    }
    if mask is not None and "input_ids" not in source:  # a text's mask is the one that it came with
        return {**found, SOURCE_MASK: mask}
    return found | ({STATES: states} if SPECTRA in source else {})


def _decode(width: int, model: PreTrainedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    past = [tensor for name, tensor in given.items() if name.startswith("past_")]
    own = GraphCache([dict(zip(_CACHE, past[i : i + 2], strict=True)) for i in range(0, len(past), 2)])
    cross = GivenCache([tensor for name, tensor in given.items() if name.startswith("cross_")])
    like = given["cross_key_values.0.key"]
    # Only its sizes are looked at: keys and values are there already.
    states = like.new_zeros(like.shape[0], like.shape[2], width)
    with tracing(own, cross), telling_decoder(model, given.get(SOURCE_MASK)):
        result = _call(
            model, EncoderDecoderCache(own, cross), encoder_outputs=_Encoded(last_hidden_state=states),
            decoder_input_ids=given["decoder_input_ids"],
        )  # fmt: skip
    names = (f"present.{i}.{part}" for i in range(len(own.layers)) for part in _CACHE)
    return {"logits": result.logits, **dict(zip(names, own.present(), strict=True))}


@dataclass
class _Encoded(BaseModelOutput):
    """What an encoder makes, of models too whose encoder says how much of it is no padding."""

    attention_mask: Tensor | None = None


def _layers(
    model: PreTrainedModel, source: Mapping[str, Tensor], fake: FakeTensorMode | None
) -> tuple[list[tuple[Tensor, ...]], Tensor | None, int]:
    """Keys and values of the cache and of the source for every layer of the decoder, of one token; the mask of the
    source's places; features that the encoder makes. Only their sizes mean something where the model's parameters are
    fake."""
    if fake is not None:
        source = {name: fake.from_tensor(tensor, static_shapes=True) for name, tensor in source.items()}
    try:
        with torch.no_grad(), quiet_transformers(), fake or nullcontext():
            own, cross, mask, states = _first_step(model, source)
    except CaptureError:
        raise
    except Exception as error:  # of transformers' code
        raise CaptureError(
            f"cannot be run for a first token: {root_cause(error)}", place=type(model).__name__,
            remedy="Its encoder alone exports as a module: AutoModel.from_pretrained(...).get_encoder()",
        ) from error  # fmt: skip
    if not own.found or own.found.keys() != cross.found.keys():
        raise CaptureError("not every layer of its decoder keeps keys and values of its own and of the source")
    return [(*own.found[i].values(), *cross.found[i].values()) for i in sorted(own.found)], mask, states.shape[-1]


def _tokens(layers: Sequence[tuple[Tensor, ...]], mask: Tensor | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Example inputs of the decoder, and what the ports of those are called whose names are no identifiers."""
    rows = layers[0][0].shape[0]
    found = {"decoder_input_ids": torch.ones(rows, _SEQUENCE, dtype=torch.int64)}
    if mask is not None:
        found[SOURCE_MASK] = torch.ones(tuple(mask.shape), dtype=torch.int64)
    for prefix, place in (("past_key_values", 0), ("cross_key_values", 2)):
        for i, tensors in enumerate(layers):
            for part, tensor in zip(_CACHE, tensors[place : place + 2], strict=True):
                length = _PAST if prefix.startswith("past") else tensor.shape[2]
                sizes = (tensor.shape[0], tensor.shape[1], length, tensor.shape[3])
                found[f"{prefix}__{i}__{part}"] = torch.zeros(sizes)
    return found, {name: name.replace("__", ".") for name in found} | {"decoder_input_ids": "input_ids"}


def _part(captured: CapturedModel, part: str, folder: ModelFolder, names: Mapping[str, str]) -> CapturedModel:
    """A part under its public names, without inputs that nothing reads."""
    read = {name for block in captured.blocks for name in block.inputs}

    def public(port: Port) -> Port:
        return replace(port, name=names.get(port.name, port.name))

    inputs = [public(port) for port in captured.inputs if port.value in read]
    settings = {"inputs": {port.name: list(port.dims) for port in inputs}, "part": part}
    cross = next((port.dims for port in captured.outputs if port.name.startswith("cross_")), ())
    # A mask has as many places as there are keys, whatever its model computes their number of.
    outputs = [
        replace(port, dims=(port.dims[0], cross[2])) if port.name == SOURCE_MASK else port for port in captured.outputs
    ]
    return replace(captured, inputs=inputs, outputs=outputs, folder=folder, settings=settings)
