"""Comparing a file in ONNX Runtime with its graph in PyTorch, block by block and token by token."""

from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch

from helpers import exports
from helpers.runners import captured_runner, load_weights, next_feeds, prompt_feeds, tokens
from qexport.api.stages import preparing
from qexport.quant.metrics import sqnr_db
from qexport.targets import cuda

STEPS = 5
ROUNDING = 1e-5  # of the largest element; float32 sums over at most 96 products leave 2e-6
STEP = 2e-2  # of the largest element: one 8-bit code of one input is at most 1/127 of it


def export(captured, recipe, target, folder, single=False, **options):
    """`exports.export`; single: the CUDA target without its last step, which makes everything float16."""
    with ExitStack() as changes:
        if single:
            single_cuda = cuda.CudaTarget(torch.float32)
            changes.enter_context(patch.object(cuda, "to_half", lambda *_: None))
            changes.enter_context(patch.object(preparing, "target_for", lambda *_: single_cuda))
        return exports.export(captured, recipe, target, folder, **options)


def differences(exported, mask):
    """For every block, step and token: the largest difference of what the block makes, over its largest element.

    Before each block the values of both sides are made equal, so that each block answers for itself alone.
    """
    run, feeds = exported.in_onnxruntime_with_blocks(), prompt_feeds(exported.captured, tokens(*mask.shape), mask)
    rows = []
    for _ in range(1 + STEPS):
        got = run(feeds)
        rows.append(block_differences(exported, exported.blocks, feeds, got))
        feeds = next_feeds(feeds, got, got["logits"][:, -1].argmax(-1))
    return torch.cat(rows)


def module_differences(exported, feeds):
    """The same for one call of an encoder or a module; of an encoder's values only real tokens count."""
    mask = feeds.get("attention_mask") if exported.manifest.kind == "encoder" else None

    def rows(value, name):
        if mask is not None and value.shape[:2] == mask.shape:
            return value[mask.bool()].reshape(int(mask.sum()), -1)
        return value.reshape(-1, value.shape[-1])

    return block_differences(exported, exported.blocks, feeds, exported.in_onnxruntime_with_blocks()(feeds), rows)


def block_differences(exported, blocks, feeds, got, rows_of=None):
    """The same for one call: its inputs, and what ONNX Runtime made, values that blocks hand on among it.

    Args:
        rows_of: the rows of a value that count, by the value and the name of the output that it is; None for a decoder.
    """
    names, rows = {port.value: port.name for port in exported.captured.outputs}, []
    values = {port.value: feeds[port.name] for port in exported.captured.inputs}
    rows_of = rows_of or Places.of(feeds, exported.manifest).rows
    following = [*(b.inputs for b in blocks[1:]), ["none"]]
    for block, entry, read in zip(blocks, exported.manifest.blocks, following, strict=True):
        with torch.no_grad():
            results = dict(zip(block.outputs, block.module(*(values[n] for n in block.inputs)), strict=True))
        handed_on = next((n for n in read if n in results), block.outputs[0])
        twins = {n: got[names[n]] for n in results if n in names} | {handed_on: got[entry.output]}
        for name, twin in twins.items():
            ours, theirs = (rows_of(v, names.get(name, "")) for v in (results[name], twin))
            rows.append((ours - theirs).abs().amax(-1) / ours.abs().max().clamp_min(1e-30))  # queries begin as zeros
        values |= results | twins
    return torch.cat(rows)


@dataclass(frozen=True)
class Places:
    """Where the real ones of the new tokens are, [batch, sequence] each.

    Attributes:
        outside: bool, in the order of the caller.
        inside: bool, in the order in which the layers see them.
        cache: int, the place of each new token in its row of the cache.
    """

    outside: torch.Tensor
    inside: torch.Tensor
    cache: torch.Tensor

    @classmethod
    def of(cls, feeds, manifest):
        new = feeds["input_ids"].shape[1]
        real, place = feeds["attention_mask"][:, -new:].bool(), torch.arange(new)
        if manifest.settings["attention"] == "standard":
            return cls(real, real, (feeds["attention_mask"].shape[1] - new + place).expand_as(real))
        before = feeds["attention_mask"][:, :-new].sum(1, keepdim=True)
        return cls(real, place < real.sum(1, keepdim=True), before + place)

    def rows(self, value, name):
        """Rows of real tokens: of activations [b, s, n], of the new part of a cache [b, h, t, d]; else all of it.

        Args:
            name: of the output of the model that it is, or empty.
        """
        outside = name == "logits"
        if name.startswith(("present.", "present_indexer.", "present_summed.")):
            value = value.transpose(1, 2).flatten(2)
            value = value.gather(1, self.cache[..., None].expand(-1, -1, value.shape[2]))
        real = self.outside if outside else self.inside
        return value[real].flatten(1) if value.shape[:2] == real.shape else value.reshape(1, -1)


def logits(mask, *runs):
    """Logits of real tokens, for each (runner, captured, dtype) with its own cache; the first chooses the tokens."""
    ids = tokens(*mask.shape)
    feeds = [prompt_feeds(captured, ids, mask, dtype) for _, captured, dtype in runs]
    collected = [[] for _ in runs]
    for _ in range(1 + STEPS):
        results = [run(fed) for (run, _, _), fed in zip(runs, feeds, strict=True)]
        chosen = results[0]["logits"][:, -1].argmax(-1)
        real = feeds[0]["attention_mask"][:, -feeds[0]["input_ids"].shape[1] :].bool()
        for kept, result in zip(collected, results, strict=True):
            kept.append(result["logits"][real].float())
        feeds = [next_feeds(fed, result, chosen) for fed, result in zip(feeds, results, strict=True)]
    return [torch.cat(kept) for kept in collected]


def assert_agree(exported, mask, flips, step=STEP):
    """All but a share of `flips` tokens agree to rounding, and those by less than a step."""
    different = differences(exported, mask)
    assert (different > ROUNDING).float().mean() <= flips
    assert different.max() < step


def assert_float16_adds_little(half, single, mask):
    """The float16 (or bfloat16) file against the float32 one of the same target.

    Args:
        half: the export; single: the same one with single=True.
    """
    ran, graph, wide, reference = logits(
        mask,
        (half.in_onnxruntime(), half.captured, half.dtype),
        (half.in_pytorch(), half.captured, half.dtype),
        (single.in_pytorch(), single.captured, torch.float32),
        (captured_runner(load_weights(half.captured)), half.captured, torch.float32),
    )
    # As far from the float32 graph as the float16 graph is in PyTorch, up to a factor of two.
    assert sqnr_db(wide, ran) > sqnr_db(wide, graph) - 6
    # And it does not cost the model more than half of what quantization does.
    assert sqnr_db(reference, ran) > sqnr_db(reference, wide) - 3
