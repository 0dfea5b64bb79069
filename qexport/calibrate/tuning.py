"""Training what a quantized model still can move, end to end, by the KL to the float model.

A step runs its batches forward through all blocks and keeps what each block read; on the way back each block is run
once more with gradients. One block's weights are in memory, and besides them the trained tensors, their moments, and
what crosses blocks for the batches of one step. No labels are needed: the float model says what is likely.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..errors import InputError, within
from ..graph.placement import move, unload
from ..progress import StageProgress, no_stage_progress
from ..recipe.sections import TuneSpec
from . import shards
from .block_activations import Stream, last_readers
from .float_model import load_block
from .loop import QuantizedBlock
from .tuned_block import Rates, Tuned, TunedRun, find_tuned, gradients

logger = logging.getLogger(__name__)

_HELD = 8  # of the batches, one in so many is not trained on and says what is kept


@dataclass(frozen=True)
class TuningRecord:
    """What came of it.

    Attributes:
        before, after: mean KL of a token to the float model over the batches that were not trained on.
        step: the one that is kept, 0 where none was better than what was there before; steps: all.
        tokens: of those batches.
        tensors: how many were trained.
    """

    before: float
    after: float
    step: int
    steps: int
    tokens: int
    tensors: int


class FloatLogits:
    """What the float model says of the batches of a stream.

    What its last block reads is kept, not the logits, which take vocabulary/hidden as much.

    Args:
        captured: the float model; stream: all its batches, run through all blocks but the last here.
    """

    def __init__(self, captured: CapturedModel, stream: Stream, progress: StageProgress) -> None:
        made = captured.output_node("logits")
        if made is None or made[0] is not captured.blocks[-1]:
            raise InputError(
                "does not make logits in its last block, and tune compares logits", place=captured.kind,
                remedy="Leave out tune",
            )  # fmt: skip
        self._block, self._captured = captured.blocks[-1], captured
        value = next(port.value for port in captured.outputs if port.name == "logits")
        self.value, self._place = value, self._block.outputs.index(value)
        for index, block in enumerate(captured.blocks[:-1]):
            progress(f"float {block.name}", index, len(captured.blocks))
            load_block(captured, block)
            stream.advance(block, index)
            unload(block.module)
        self._inputs = [stream.inputs(self._block, number) for number in range(len(stream.masks))]

    @contextmanager
    def loaded(self):
        """Hold the weights of the last block inside the `with`."""
        load_block(self._captured, self._block)
        try:
            yield
        finally:
            unload(self._block.module)

    @torch.no_grad()
    def of(self, batch: int) -> Tensor:
        """[batch, sequence, vocabulary]."""
        logits: Tensor = self._block.module(*self._inputs[batch])[self._place]
        return logits


def kl_and_gradient(wanted: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[float, Tensor]:
    """The sum over real tokens of KL(wanted || logits), and its gradient with respect to the logits."""
    likely, found = wanted.float().log_softmax(-1), logits.detach().float().log_softmax(-1)
    real = torch.ones(likely.shape[:-1], device=likely.device) if mask is None else mask.float()
    share = likely.exp()
    kl = ((share * (likely - found)).sum(-1) * real).sum()
    return float(kl), found.exp_().sub_(share).mul_(real[..., None])


class Tuning:
    """Quantized blocks in training.

    Args:
        captured: the quantized model, whose graphs those of `blocks` are.
        blocks: on disk.
        wanted: what the float model says.
        stream: the same batches; only what the first blocks read is taken of it.
        rates: of the first step.
    """

    def __init__(
        self, captured: CapturedModel, blocks: Sequence[QuantizedBlock], wanted: FloatLogits, stream: Stream,
        rates: Rates,
    ) -> None:
        self._blocks, self._wanted, self._stream = blocks, wanted, stream
        self._device, self._readers = captured.placement.device, last_readers(captured)
        self._made = {name for item in blocks for name in item.block.outputs}
        self.tuned: dict[str, Tuned] = {}
        self._last: dict[str, int] = {}  # the first block that reads a trained tensor is the last on the way back
        for index, item in enumerate(blocks):
            with within(item.block.name):
                for name, tensor in find_tuned(item.block.module, rates, partial(_on, self._device, item.read)).items():
                    self.tuned.setdefault(name, tensor)
                    self._last.setdefault(name, index)

    def kl(self, batches: Sequence[int]) -> float:
        """Mean over the real tokens of batches."""
        values = [dict(self._stream.batches[number]) for number in batches]
        for index, item in enumerate(self._blocks):
            with self._loaded(item), torch.no_grad():
                run = TunedRun(item.block.module, self.tuned)
                for given in values:
                    self._forward(run, item.block, index, given)
        found = [self._compare(number, given)[0] for number, given in zip(batches, values, strict=True)]
        return sum(found) / self.tokens(batches)

    def tokens(self, batches: Sequence[int]) -> int:
        """How many are real."""
        masks = [self._stream.masks[number] for number in batches]
        sizes = [self._stream.batches[number] for number in batches]
        return sum(
            int(mask.sum()) if mask is not None else next(iter(size.values())).shape[:2].numel()
            for mask, size in zip(masks, sizes, strict=True)
        )

    def step(self, batches: Sequence[int], left: float) -> float:
        """One update by the mean KL over batches, which it returns; left: share of the rates that is left."""
        values = [dict(self._stream.batches[number]) for number in batches]
        kept: list[list[tuple[Tensor, ...]]] = []
        for index, item in enumerate(self._blocks[:-1]):
            kept.append([self._inputs(item.block, given) for given in values])
            with self._loaded(item), torch.no_grad():
                run = TunedRun(item.block.module, self.tuned)
                for given in values:
                    self._forward(run, item.block, index, given)
        kept.append([self._inputs(self._blocks[-1].block, given) for given in values])
        tokens, total = self.tokens(batches), 0.0
        passed: list[dict[str, Tensor]] = [{} for _ in batches]
        for index in reversed(range(len(self._blocks))):
            item, inputs = self._blocks[index], kept.pop()
            with self._loaded(item), torch.enable_grad():
                for place, number in enumerate(batches):
                    total += self._back(item.block, number, inputs[place], passed[place], tokens)
            for name, last in self._last.items():
                if last == index:
                    self.tuned[name].step(left)
        return total / tokens

    def _back(
        self, block: Block, batch: int, inputs: Sequence[Tensor], passed: dict[str, Tensor], tokens: int
    ) -> float:
        """One batch through one block and back; passed: gradients of values by name, taken and added to."""
        given = [
            value.detach().requires_grad_(name in self._made and value.is_floating_point())
            for name, value in zip(block.inputs, inputs, strict=True)
        ]
        run, kl = TunedRun(block.module, self.tuned), 0.0
        results = dict(zip(block.outputs, run.run(*given), strict=True))
        if (logits := results.get(self._wanted.value)) is not None:
            kl, gradient = kl_and_gradient(self._wanted.of(batch), logits, self._stream.masks[batch])
            passed[self._wanted.value] = gradient.div_(tokens)
        ends = [(value, passed.pop(name)) for name, value in results.items() if name in passed]
        read = [(name, value) for name, value in zip(block.inputs, given, strict=True) if value.requires_grad]
        of_tuned, of_inputs = gradients(run, [value for _, value in read], ends)
        for name, found in of_tuned.items():
            self.tuned[name].add(found)
        for (name, _), found in zip(read, of_inputs, strict=True):
            if found is not None:
                passed[name] = passed[name] + found if name in passed else found
        return kl

    def _compare(self, batch: int, values: Mapping[str, Tensor]) -> tuple[float, Tensor]:
        return kl_and_gradient(self._wanted.of(batch), values[self._wanted.value], self._stream.masks[batch])

    def _inputs(self, block: Block, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(_on_device(values[name], self._device) for name in block.inputs)

    def _forward(self, run: TunedRun, block: Block, index: int, values: dict[str, Tensor]) -> None:
        """Advance the values of a batch through a block, as `Stream.advance` does."""
        results = run.run(*self._inputs(block, values))
        for name, result in zip(block.outputs, results, strict=True):
            if self._readers.get(name, -1) > index or name == self._wanted.value:
                values[name] = result
        for name in [n for n in values if self._readers.get(n, -1) <= index and n != self._wanted.value]:
            del values[name]

    @contextmanager
    def _loaded(self, item: QuantizedBlock):
        try:
            item.fill()
            move(item.block.module, self._device)
            yield
        finally:
            unload(item.block.module)


def tune(
    captured: CapturedModel,
    before: CapturedModel,
    blocks: Sequence[QuantizedBlock],
    spec: TuneSpec,
    streams: Callable[[], Stream],
    work: Path,
    progress: StageProgress = no_stage_progress,
) -> tuple[list[QuantizedBlock], TuningRecord]:
    """Train scales, zero points, norms and codes of a quantized model, and write its blocks anew.

    The step with the least KL over batches that were not trained on is kept.

    Args:
        captured: the quantized model; before: the same in float.
        blocks: of the quantized one; their files stay as they are.
        streams: makes the calibration inputs.
        work: folder for the new files.

    Raises:
        InputError: the model makes no logits, or there are too few batches to keep some apart.
        PassError: activations or the cache are rounded.
    """
    rates = Rates(spec.rate, spec.norm_rate, spec.zero_rate, spec.code_rate)
    stream = streams()
    count = len(stream.masks)
    if count < 2:
        raise InputError(
            f"has {count} batch, but tune sets one aside", place="calibration",
            remedy="Give more samples or a smaller batch_size",
        )  # fmt: skip
    held = list(range(0, count, _HELD)) if count >= _HELD else [0]
    trained = [number for number in range(count) if number not in held]
    wanted = FloatLogits(before, streams(), progress)
    with wanted.loaded():
        tuning = Tuning(captured, blocks, wanted, stream, rates)
        start = least = tuning.kl(held)
        best, at = _settled(tuning), 0
        logger.info("KL before: %.4f", start)
        for step in range(spec.steps):
            progress(f"step {step + 1}, KL {least:.4f}", step, spec.steps)
            drawn = [trained[(step * spec.batches + place) % len(trained)] for place in range(spec.batches)]
            kl = tuning.step(list(dict.fromkeys(drawn)), 1 - step / spec.steps)
            logger.debug("step %d: KL %.4f on what was trained on", step + 1, kl)
            if (step + 1) % spec.check_every == 0 or step + 1 == spec.steps:
                kl = tuning.kl(held)
                logger.info("step %d: KL %.4f on what was not trained on", step + 1, kl)
                if kl < least:
                    least, best, at = kl, _settled(tuning), step + 1
    progress("", spec.steps, spec.steps)
    record = TuningRecord(start, least, at, spec.steps, tuning.tokens(held), len(tuning.tuned))
    work.mkdir(parents=True, exist_ok=True)
    return [_written(item, best, work / item.shard.name) for item in blocks] if at else list(blocks), record


def _settled(tuning: Tuning) -> dict[str, Tensor]:
    return {name: tensor.settled() for name, tensor in tuning.tuned.items()}


def _written(item: QuantizedBlock, values: Mapping[str, Tensor], place: Path) -> QuantizedBlock:
    """A block with other values of some tensors, in a file of its own."""
    module = item.block.module
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    changed = {name: values[name].cpu() for name in names if name in values}
    stored = {name: item.load(name) for name in item.stored - set(changed)} | changed
    shards.save_block(place, item.block, stored, item.run)
    return replace(item, shard=place, stored=set(stored))


def _on(device: torch.device, read: Callable[[str], Tensor], name: str) -> Tensor:
    return read(name).to(device)


def _on_device(value: Tensor, device: torch.device) -> Tensor:
    """A value on a device; sizes, which are plain numbers, are everywhere."""
    return value.to(device) if isinstance(value, Tensor) else value
