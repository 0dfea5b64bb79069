"""Running a decoder prompt first and token by token then, whatever it is: blocks, transformers' model, a session.

A runner maps feeds (public input names to tensors) to results (public output names to tensors).
"""

from collections.abc import Callable, Sequence

import torch

from qexport.artifact.cache_names import is_past, past_of, present_of
from qexport.capture.blocks import Block
from qexport.capture.graph import CapturedModel, Port
from qexport.graph.edit import set_tensor
from qexport.models.steps import Steps

Feeds = dict[str, torch.Tensor]
Runner = Callable[[Feeds], Feeds]


def load_weights(captured: CapturedModel) -> CapturedModel:
    """Give every block its real weights."""
    for block in captured.blocks:
        for name in block.parameters:
            set_tensor(block.module, name, captured.load(name))
    return captured


def block_runner(blocks: Sequence[Block], inputs: Sequence[Port], outputs: Sequence[Port]) -> Runner:
    """Blocks one after another in PyTorch."""

    def run(feeds: Feeds) -> Feeds:
        values = {port.value: feeds[port.name] for port in inputs}
        with torch.no_grad():
            for block in blocks:
                values.update(zip(block.outputs, block.module(*(values[n] for n in block.inputs)), strict=True))
        return {port.name: values[port.value] for port in outputs}

    return run


def captured_runner(captured: CapturedModel) -> Runner:
    return block_runner(captured.blocks, captured.inputs, captured.outputs)


def transformers_runner(model: torch.nn.Module) -> Runner:
    """A model of transformers with its own cache; past_key_values are what it keeps itself, present is not given."""
    steps: list[Steps] = []

    def run(feeds: Feeds) -> Feeds:
        if feeds["input_ids"].shape[1] == feeds["attention_mask"].shape[1]:
            steps[:] = [Steps(model)]
        names = ("input_ids", "attention_mask", "position_ids")
        return {"logits": steps[0](**{n: feeds[n] for n in names}).logits}

    return run


def prompt_feeds(captured: CapturedModel, ids: torch.Tensor, mask: torch.Tensor, dtype=torch.float32) -> Feeds:
    """A prompt [batch, sequence] with its attention mask and an empty cache."""
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    for port in captured.inputs:
        if is_past(port.name):
            feeds[port.name] = port.empty(ids.shape[0]).to(dtype)
    return feeds


def next_feeds(feeds: Feeds, results: Feeds, token: torch.Tensor) -> Feeds:
    """The feeds that append token [batch] to what was run."""
    mask = torch.cat([feeds["attention_mask"], torch.ones_like(token)[:, None]], dim=1)
    past = {n: results.get(present_of(n), feeds[n]) for n in feeds if is_past(n)}
    return {"input_ids": token[:, None], "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, **past}


def tokens(batch: int, sequence: int, seed: int = 0, vocab: int = 128) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def padded(lengths: Sequence[int], side: str) -> torch.Tensor:
    """The attention mask of rows of these lengths, padded to the longest."""
    longest = max(lengths)
    rows = [[1] * n + [0] * (longest - n) for n in lengths]
    return torch.tensor([row[::-1] if side == "left" else row for row in rows])


def run_twice(captured: CapturedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the real tokens of a prompt and of one more token, which reads the cache."""
    run, feeds = captured_runner(captured), prompt_feeds(captured, ids, mask)
    first = run(feeds)
    second = run(next_feeds(feeds, first, ids[:, 0]))
    return torch.cat([first["logits"][mask.bool()], second["logits"][:, 0]])


def source_of(encoder: CapturedModel, mask: torch.Tensor, vocab: int = 128) -> Feeds:
    """What the encoder of an encoder-decoder reads: texts with this mask, or as much sound."""
    if encoder.inputs[0].name == "input_ids":
        return {"input_ids": tokens(*mask.shape, vocab=vocab), "attention_mask": mask}
    port, random = encoder.inputs[0], torch.Generator().manual_seed(1)
    if len(encoder.inputs) == 1:
        return {port.name: torch.randn(len(mask), *port.dims[1:], generator=random)}
    # Sound of any length: a token of the mask is a few frames or a few hundred samples.
    mask = mask.repeat_interleave(7 if len(port.dims) == 3 else 400, 1)
    return {port.name: torch.randn(*mask.shape, *port.dims[2:], generator=random), "attention_mask": mask}


def stepwise(
    encode: Runner, decode: Runner, decoder: CapturedModel, source: Feeds, text: torch.Tensor, prompt: int = 3
) -> tuple[torch.Tensor, list[tuple[Feeds, Feeds]]]:
    """Logits of an encoder-decoder for a text [batch, sequence], and what went in and came out of every call.

    Args:
        prompt: tokens of the text that come first; the others come one by one, with the cache.
    """
    cross, past, calls = encode(source), {}, []
    for port in decoder.inputs:
        if port.name.startswith("past"):
            past[port.name] = torch.zeros(len(text), port.dims[1], 0, port.dims[3])
    for ids in [text[:, :prompt], *text[:, prompt:].split(1, 1)]:
        feeds = {"encoder_attention_mask": source.get("attention_mask"), "input_ids": ids, **past, **cross}
        feeds = {port.name: feeds[port.name] for port in decoder.inputs}
        calls.append((feeds, decode(feeds)))
        past = {past_of(n): t for n, t in calls[-1][1].items() if n != "logits"}
    return torch.cat([made["logits"] for _, made in calls], 1), calls
