"""Text as an encoder reads it: padding behind the tokens, and the tokenizer's last token at the end."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..capture.graph import CapturedModel
from .block_activations import Stream, stream_of
from .sources import Samples


def encoder_batch(captured: CapturedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """All inputs of an encoder by public name; where it chooses one of several texts, all rows are for one choice.

    Args:
        ids, mask: int64 [batch, sequence]; padding anywhere.
    """
    order = (1 - mask).argsort(dim=1, stable=True)  # positions of learned embeddings count from the left
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    padding = getattr(captured.origin.config, "pad_token_id", None) or 0
    ids = torch.where(mask.bool(), ids, padding)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {p.name: feeds[p.name] if len(p.dims) == 2 else feeds[p.name][None] for p in captured.inputs}


def encoder_stream(captured: CapturedModel, samples: Samples, batch_size: int) -> Stream:
    """The model's inputs for calibration samples."""
    ids = with_last_token(samples.input_ids, captured)  # their rows end with a token
    pairs = list(zip(ids.split(batch_size), samples.attention_mask.split(batch_size), strict=True))
    if all(port.name != "attention_mask" for port in captured.inputs):  # padding would be read as text
        pairs = list(_of_one_length(ids, samples.attention_mask, batch_size))
    feeds = [encoder_batch(captured, *pair) for pair in pairs]
    masks = [batch.get("attention_mask", mask) for batch, (_, mask) in zip(feeds, pairs, strict=True)]
    counted = [mask.flatten(0, -2).bool() for mask in masks]
    return stream_of(captured, feeds, counted)


def _of_one_length(ids: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without padding, the shortest rows first."""
    lengths = mask.sum(1)
    for length in lengths.unique().tolist():
        rows = [row[kept.bool()] for row, kept in zip(ids[lengths == length], mask[lengths == length], strict=True)]
        for batch in torch.stack(rows).split(size):
            yield batch, torch.ones_like(batch)


def with_last_token(ids: Tensor, captured: CapturedModel) -> Tensor:
    """Windows cut out of a text with what the tokenizer puts behind a text in the place of their last token.

    Args:
        ids: int64 [n, S], every row ending with a token.
    """
    tokenizer = captured.origin.tokenizer()
    if tokenizer is None or (last := tokenizer("a")["input_ids"][-1]) not in tokenizer.all_special_ids:
        return ids
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], last)], dim=1)
