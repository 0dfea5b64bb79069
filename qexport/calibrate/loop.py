"""The block loop: load a block, calibrate it on what the quantized blocks before it produce, change it, write it.

At any moment one block's weights are in memory, and the activations that blocks not yet run will need.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from .. import ranks
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import CPU, computing
from ..errors import InputError, PassError, within
from ..graph.edit import attributes, delete_tensor, get_tensor, set_tensor
from ..graph.narrow import same_memory
from ..graph.placement import make_on, move, unload
from ..passes.base import GraphPass, Pipeline, log_sites
from ..progress import StageProgress, no_stage_progress
from ..quant.narrowing import narrowed
from . import shards
from .block_activations import Reference, Stream, batches, sqnr
from .coverage import Coverage
from .float_model import load_block
from .memory import trim

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
_AGAIN = "Export without --resume to start again"


@dataclass(frozen=True)
class BlockRecord:
    """What happened to a block.

    Attributes:
        sqnr_db: of what it hands on, against the float model, on the calibration data; None without calibration.
        changed, skipped: by pass, (site, what) pairs.
        unseen: by name of the linear, how many of its input features calibration never made active.
    """

    name: str
    seconds: float
    sqnr_db: float | None = None
    changed: Mapping[str, list] = field(default_factory=dict)
    skipped: Mapping[str, list] = field(default_factory=dict)
    unseen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedBlock:
    """A quantized block whose tensors are on disk.

    Attributes:
        block: its graph; tensors are on the meta device.
        record: what happened to it.
        shard, run: its file and who wrote it; stored: names of the tensors in there.
    """

    block: Block
    record: BlockRecord
    shard: Path
    run: str
    stored: set[str]
    captured: CapturedModel

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the block's graph: its own small ones, else see `load`."""
        own = get_tensor(self.block.module, name)
        return self.load(name) if own.device.type == "meta" else own

    def load(self, name: str) -> torch.Tensor:
        """A tensor of the block's shard, else of the checkpoint."""
        return shards.load_tensor(self.shard, name, self.run) if name in self.stored else self.captured.load(name)

    def fill(self) -> None:
        """Load every tensor, in the dtype that the graph says."""
        for name in attributes(self.block.module.graph):
            own = get_tensor(self.block.module, name)
            set_tensor(self.block.module, name, narrowed(self.read(name), own.dtype, name))


def quantize_blocks(
    captured: CapturedModel,
    passes: Sequence[GraphPass],
    stream: Stream | None,
    reference: Reference | None,
    work: Path,
    fingerprint: str,
    *,
    resume: bool = False,
    progress: StageProgress = no_stage_progress,
) -> list[QuantizedBlock]:
    """Quantize all blocks of a model.

    Args:
        captured: the model; its blocks' graphs are changed in place.
        passes: each is run on the blocks it works on.
        stream: calibration inputs, advanced through the quantized blocks; None when no pass needs data.
        reference: of the same inputs what the float blocks hand on, for the SQNR of each block.
        work: folder of shards and journal; made if missing. Of several processes the first one writes.
        fingerprint: identifies model, recipe and data; a journal with another one is not continued.
        resume: continue after the last finished block found in `work`.
        progress: called with (block name, blocks done, blocks in all).

    Raises:
        InputError: `resume` with a folder of another export.
        NumericsError: NaN or Inf in weights or activations.
    """
    run, done = ranks.first(partial(_journal, work, fingerprint, resume))
    finished = []
    total = len(captured.blocks)
    for index, block in enumerate(captured.blocks):
        progress(block.name, index, total)
        place = work / f"{index:04d}.safetensors"
        if index < len(done):
            finished.append(_continue(captured, block, place, run, done[index], index, stream, reference))
            continue
        with within(block.name), computing(block.name, captured.placement):
            item = _one(captured, block, passes, stream, reference, finished, total, place, run)
        finished.append(item)
        trim()
        ranks.first(partial(_note, work, item.record))
    progress("", total, total)
    return finished


def _one(
    captured, block: Block, passes, stream, reference, finished, total: int, place: Path, run: str
) -> QuantizedBlock:
    started, index = time.perf_counter(), len(finished)
    last = index == total - 1
    steps = [step for step in passes if step.applies_to(block.module)]
    loaded: dict[str, torch.Tensor] = {}
    if steps or (stream is not None and not last):
        loaded = _load(captured, block)
    if reference is not None and not last:
        reference.advance(block, index)
    results, coverage = {}, Coverage(block, stream)
    if steps:
        sample = stream.inputs(block, 0) if stream is not None else ()
        with torch.no_grad():
            results = Pipeline(steps).run(
                block.module, coverage.collect, sample, batches(captured, block, stream, reference),
                partial(_earlier, finished, captured.placement.device),
            )  # fmt: skip
        _untie(captured, block, loaded)
    decibels = None
    if stream is not None and not last:
        stream.advance(block, index)
        decibels = None if reference is None else sqnr(captured, block, stream, reference)
    make_on(block.module, CPU)
    stored = {
        name: get_tensor(block.module, name).to(CPU)
        for name in attributes(block.module.graph)
        if loaded and (name not in loaded or not same_memory(get_tensor(block.module, name), loaded[name]))
    }
    ranks.first(partial(shards.save_block, place, block, stored, run))
    unload(block.module)
    for name, result in results.items():
        log_sites(block.name, name, result.changed, result.skipped)
    seconds = time.perf_counter() - started
    if decibels is not None:
        logger.info("%s: SQNR %.1f dB", block.name, decibels)
    logger.debug("%s: %.2f s, %d tensors stored", block.name, seconds, len(stored))
    record = BlockRecord(
        block.name, round(seconds, 3), decibels,
        {name: [(n.site, n.what, dict(n.data)) for n in r.changed] for name, r in results.items() if r.changed},
        {name: [(n.site, n.what) for n in r.skipped] for name, r in results.items() if r.skipped}, coverage.unseen,
    )  # fmt: skip
    return QuantizedBlock(block, record, place, run, set(stored), captured)


def _earlier(finished: list[QuantizedBlock], device: torch.device, name: str) -> torch.Tensor:
    """A tensor that a finished block made, on a device."""
    for item in finished:
        if name in item.stored:
            return item.read(name).to(device)
    raise PassError(f"no block before this one has made {name}")


def _untie(captured: CapturedModel, block: Block, loaded: dict[str, torch.Tensor]) -> None:
    """Give a changed tensor that other blocks read too, such as a tied embedding, a name of its own."""
    elsewhere = {name for other in captured.blocks if other is not block for name in other.parameters}
    module, renamed = block.module, False
    for name in sorted(elsewhere.intersection(loaded, attributes(module.graph))):
        changed = get_tensor(module, name)
        if same_memory(changed, loaded[name]):
            continue
        own, renamed = f"{block.name}.{name}", True
        set_tensor(module, own, changed)
        for node in module.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = own
        delete_tensor(module, name)
    if renamed:
        module.recompile()


def _load(captured: CapturedModel, block: Block) -> dict[str, torch.Tensor]:
    load_block(captured, block)
    return {name: get_tensor(block.module, name) for name in block.parameters}


def _journal(work: Path, fingerprint: str, resume: bool) -> tuple[str, list[BlockRecord]]:
    """The run that wrote the blocks, and what happened to those that are finished; a new run where none is."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / JOURNAL
    text = path.read_text(encoding="utf-8") if resume and path.exists() else ""
    # A line that a kill or a full disk cut short is no line.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        for old in [*work.glob("*.safetensors"), *work.glob("*.part")]:
            old.unlink()
        run = uuid.uuid4().hex
        path.write_text(json.dumps({"fingerprint": fingerprint, "run": run}) + "\n", encoding="utf-8")
        return run, []
    try:
        header, records = json.loads(lines[0]), [BlockRecord(**json.loads(line)) for line in lines[1:]]
        known, run = header["fingerprint"], header["run"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"is damaged ({error})", place=str(path), remedy=_AGAIN) from None
    if known != fingerprint:
        raise InputError(
            "holds an export of another model, recipe, calibration, target or version of a library", place=str(work),
            remedy=_AGAIN,
        )  # fmt: skip
    os.truncate(path, sum(len(line.encode()) for line in lines))
    return run, records


def _note(work: Path, record: BlockRecord) -> None:
    """Write down that a block is finished."""
    with (work / JOURNAL).open("a") as journal:
        journal.write(json.dumps(asdict(record)) + "\n")


def _continue(
    captured, block: Block, place: Path, run: str, record: BlockRecord, index: int, stream, reference
) -> QuantizedBlock:
    """Read a finished block back and let the calibration data pass through it."""
    if reference is not None and index < len(captured.blocks) - 1:
        _load(captured, block)
        reference.advance(block, index)
    restored, stored = shards.load_block(place, run)
    block.module = restored.module
    item = QuantizedBlock(block, record, place, run, stored, captured)
    if stream is not None and index < len(captured.blocks) - 1:
        item.fill()
        move(block.module, captured.placement.device)
        stream.advance(block, index)
    unload(block.module)
    return item
