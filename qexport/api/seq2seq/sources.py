"""What the two parts of an encoder-decoder read: sources, and texts that the float model writes about them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ...artifact.manifest import SOURCE_MASK
from ...calibrate.data import Prepared, writes_no_source
from ...calibrate.encoder_inputs import with_last_token
from ...calibrate.features import feature_batches, sources_of_lengths
from ...calibrate.self_text import continue_text
from ...calibrate.sources import load_samples
from ...capture.seq2seq import Parts
from ...device import CPU, computing
from ...models.tokens import embedding_rows
from ...recipe.recipe import CalibrationSpec
from ...runtime.seq2seq import habits_of

Feeds = Mapping[str, Tensor]
_CROSS_BYTES = 1 << 30  # of keys and values of sources in memory at once


@dataclass(frozen=True)
class Sources:
    """What the encoder reads, batch by batch; no batch holds padding.

    Attributes:
        batches: by public name, int64 [batch, source] or features.
        described: what they are, for reports.
        own: chance made them, so that measures say little.
    """

    batches: list[dict[str, Tensor]]
    described: str
    own: bool = False


def check_sources(parts: Parts, spec: CalibrationSpec, data: Any) -> None:
    """Raises InputError, before the work begins, where the model is to write the sources, which it cannot."""
    if data is not None or spec.source != "self":
        return
    raise writes_no_source(parts.encoder.inputs[0].name == "input_ids")


def load_sources(parts: Parts, spec: CalibrationSpec, data: Any = None) -> Sources:
    """The sources that `spec` names, or those in `data`.

    Args:
        data: for a model of text a list of strings or token ids [n, S]. For one of sound what its processor makes: a
            tensor, [n, ...]; where a source may be of any length also a list of tensors, [frames, bins] or [samples]
            each, or a dict of tensors with the attention_mask of a padded batch. In spec.source the path of a
            safetensors file with such tensors.

    Raises:
        InputError: no such data, or not what this model reads.
    """
    name = parts.encoder.inputs[0].name
    if name == "input_ids":
        return _texts(parts, spec, data)
    return _features(parts, spec, data, name)


def _texts(parts: Parts, spec: CalibrationSpec, data: Any) -> Sources:
    folder = parts.encoder.origin
    limit = getattr(folder.config, "max_position_embeddings", None) or spec.sequence_length
    own = data is None and spec.source == "random"
    spec = spec.model_copy(update={"sequence_length": min(spec.sequence_length, limit)})
    size = embedding_rows(parts.model)
    samples = load_samples(spec, data, tokenizer=folder.tokenizer(), vocab_size=size)
    rows = [ids[mask.bool()] for ids, mask in zip(samples.input_ids, samples.attention_mask, strict=True)]
    if data is None:  # windows end where they are cut
        rows = list(with_last_token(torch.stack(rows), parts.encoder))
    return Sources(batches_of(parts, rows, spec.batch_size), samples.described, own)


def batches_of(parts: Parts, rows: Sequence[Tensor], size: int) -> list[dict[str, Tensor]]:
    """What the encoder reads of texts of token ids [source], at most `size` of them together."""
    names = {port.name for port in parts.encoder.inputs}
    batches = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in _stacked(rows, size))
    return [{name: tensor for name, tensor in batch.items() if name in names} for batch in batches]


def _stacked(rows: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Those of one length together, at most `size` of them; the shortest first where rows go together at all."""
    rows, start = sorted(rows, key=len) if size > 1 else rows, 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and stop - start < size and len(rows[stop]) == len(rows[start]):
            stop += 1
        yield torch.stack(list(rows[start:stop]))
        start = stop


def _features(parts: Parts, spec: CalibrationSpec, data: Any, name: str) -> Sources:
    port, *others = parts.encoder.inputs
    rows, given = None, f"{name}, given"
    if others:  # any length, and a mask
        rows, described = sources_of_lengths(port, spec, data, given)
    if rows is None:
        module = None if parts.streamed else parts.model.get_encoder()
        batches, described, own = feature_batches([port], spec, data, "sources", name, given, module)
    else:
        batches, own = [{name: batch} for batch in _stacked(rows, spec.batch_size)], False
    masks = {other.name: other.dtype for other in others}
    whole = [
        batch | {mask: torch.ones(batch[name].shape[:2], dtype=dtype) for mask, dtype in masks.items()}
        for batch in batches
    ]
    return Sources(whole, described, own)


def write_about(parts: Parts, sources: Sources, new_tokens: int, *, seed: int | None = None) -> Prepared:
    """Let the float model write about sources, at most as many of them as fit into memory.

    Args:
        new_tokens: of each text behind the tokens that every text begins with, fewer where the model's positions end;
            no text ends before.
        seed: of sampled tokens; None takes the likeliest ones.

    Returns:
        all that the decoder reads for them, the cache empty, on the CPU.
    """
    config = parts.model.config.get_text_config(decoder=True)
    start = torch.tensor([habits_of(parts.encoder.origin.path).start])
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    new_tokens = min([new_tokens, *(limit - start.shape[1] for limit in limits if isinstance(limit, int))])
    with parts.whole() as model:
        batches = _written(parts, model, sources, start, new_tokens, seed)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    how = "likeliest" if seed is None else "sampled"
    described = f"{texts} texts of {new_tokens} {how} tokens that the model writes about {sources.described}"
    return Prepared(batches, described)


def _written(
    parts: Parts, whole: PreTrainedModel, sources: Sources, start: Tensor, new_tokens: int, seed: int | None
) -> list[Feeds]:
    """What the decoder reads for each batch of sources, as far as there is room."""
    placement, names = parts.decoder.placement, [port.name for port in parts.decoder.inputs]
    # One that reads its weights while it runs reads them to the CPU.
    device = CPU if any(parameter.is_meta for parameter in whole.parameters()) else placement.device
    batches: list[Feeds] = []
    generator = torch.Generator().manual_seed(seed or 0)
    room = _CROSS_BYTES
    with computing("the whole float model", placement):
        model: Any = whole if device == CPU else deepcopy(whole)
        if device != CPU:
            model.to(device)
    for source in sources.batches:
        rows = len(next(iter(source.values())))
        with torch.no_grad(), computing("the whole float model", placement):
            there = {name: tensor.to(device) for name, tensor in source.items()}
            states = model.get_encoder()(**there)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            ids = continue_text(
                _stepper(parts, model, there, states, cache), start.to(device).expand(rows, -1), new_tokens, generator,
                greedy=new_tokens if seed is None else 4,
            )  # fmt: skip
        feeds = {"input_ids": ids.to(CPU), **_cross(cache), **_empty(parts, rows)}
        # No source holds padding.
        feeds[SOURCE_MASK] = torch.ones(rows, feeds["cross_key_values.0.key"].shape[2], dtype=torch.int64)
        room -= sum(tensor.nbytes for tensor in feeds.values())
        if room < 0 and batches:
            break
        batches.append({name: feeds[name] for name in names})
    return batches


def _stepper(parts: Parts, model: Any, source: Feeds, states: Any, cache: EncoderDecoderCache):
    ends = list(habits_of(parts.encoder.origin.path).ends)
    mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}

    def step(ids: Tensor, _past: Any) -> tuple[Tensor, Any]:
        made = model(encoder_outputs=states, decoder_input_ids=ids, past_key_values=cache, use_cache=True, **mask)
        logits = made.logits[:, -1]
        # Behind the end of a text there is nothing to learn from.
        return logits.index_fill(-1, torch.tensor(ends, device=logits.device, dtype=torch.int64), -math.inf), cache

    return step


def _cross(cache: EncoderDecoderCache) -> dict[str, Tensor]:
    layers: list[Any] = cache.cross_attention_cache.layers
    return {
        f"cross_key_values.{i}.{part}": tensor.to(CPU)
        for i, layer in enumerate(layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


def _empty(parts: Parts, rows: int) -> dict[str, Tensor]:
    ports = (port for port in parts.decoder.inputs if port.name.startswith("past_key_values."))
    return {port.name: port.empty(rows) for port in ports}
