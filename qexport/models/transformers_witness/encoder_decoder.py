"""A part of an encoder-decoder as a witness."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from ...artifact.manifest import SOURCE_MASK, STATES
from ..source_mask import telling_decoder
from ..witness import Call, Outline, Testimony
from .loading import quiet
from .running import PROMPT, STEPS, random_tokens, run
from .said import said_independently

if TYPE_CHECKING:
    from ..source import ModelFolder


@dataclass(frozen=True)
class PartWitness:
    """The encoder or the decoder of an encoder-decoder, which transformers runs as one model.

    Attributes:
        loader: an auto class of transformers.
        captured: as in `EncoderWitness`.
        source: an input of the encoder, whose shapes are taken.
        decodes: whether it is the decoder.
    """

    folder: "ModelFolder"
    loader: type[Any]
    captured: PreTrainedModel | None
    source: Mapping[str, Tensor]
    decodes: bool

    def __deepcopy__(self, memo):
        return self

    def testify(self, outline: Outline) -> Testimony:
        calls = self._decoded if self.decodes else self._encoded
        with quiet():
            return said_independently(self.loader, self.folder, self.captured, outline, calls)

    def _sources(self, model: PreTrainedModel) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(like.shape, generator=random) if like.is_floating_point()
            else torch.ones_like(like) if name == "attention_mask" else random_tokens(model, like.shape)
            for name, like in self.source.items()
        }  # fmt: skip

    def _read(self, model: PreTrainedModel, source: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """What the encoder makes, and the keys and values that the decoder's layers make of it."""
        states, cache = run(model.get_encoder(), **source), _caches()
        first = random_tokens(model, (len(next(iter(source.values()))), 1))
        mask = {name: mask for name, mask in source.items() if name == "attention_mask"}
        with telling_decoder(model) as said:
            # A copy: Moonshine's streaming decoder adds positions to the very states that it is handed.
            run(
                model, encoder_outputs=deepcopy(states), decoder_input_ids=first, past_key_values=cache, use_cache=True,
                **mask,
            )  # fmt: skip
        told = {SOURCE_MASK: said[0].to(torch.int64)} if said else {}
        return states, told | {
            f"cross_key_values.{i}.{part}": tensor
            for i, (keys, values) in enumerate(_kept(cache.cross_attention_cache))
            for part, tensor in (("key", keys), ("value", values))
        }

    def _encoded(self, model: PreTrainedModel) -> list[Call]:
        source = self._sources(model)
        states, cross = self._read(model, source)
        return [Call(source, cross | {STATES: states.last_hidden_state})]

    def _decoded(self, model: PreTrainedModel) -> list[Call]:
        source = self._sources(model)
        states, cross = self._read(model, source)
        cache, calls, start = _caches(), [], 0
        mask = {name: mask for name, mask in source.items() if name == "attention_mask"}
        length = PROMPT // 4  # of what is decoded: some models write a few tokens only
        ids = random_tokens(model, (len(next(iter(source.values()))), length + STEPS))
        for end in range(length, length + STEPS + 1):
            made = run(
                model, encoder_outputs=deepcopy(states), decoder_input_ids=ids[:, start:end], past_key_values=cache,
                use_cache=True, **mask,
            )  # fmt: skip
            feeds = {"input_ids": ids[:, start:end], **cross}
            calls.append(Call(feeds, {"logits": made.logits}))
            start = end
        return calls


def _kept(cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    layer: Any
    for layer in cache.layers:
        yield layer.keys, layer.values


def _caches() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())
