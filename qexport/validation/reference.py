"""The float model run block by block: one block's weights in memory, and the values that later blocks need."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..artifact.manifest import MODEL_FILE, Manifest
from ..calibrate.block_activations import Feeds, decoder_inputs, stream_of
from ..calibrate.float_model import load_block, weights_of
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import CPU, computing
from ..errors import InputError
from ..graph.convolution_sites import products
from ..graph.placement import unload
from ..graph.sites import linears
from ..progress import StageProgress, no_stage_progress
from ..quant.float_types import FLOAT_TYPES
from ..runtime.tensors import tensor_of

_FLOATS = {kind.onnx: dtype for dtype, kind in FLOAT_TYPES.items()}
# Tensors larger than this are not read to tell two checkpoints apart.
_COMPARED = 1 << 26


def decoder_feeds(captured: CapturedModel, windows: Tensor) -> list[Feeds]:
    """Inputs of a decoder, cache empty, one batch for each window [n, S]."""
    return [decoder_inputs(captured, ids[None], torch.ones_like(ids[None])) for ids in windows]


def rows_of(feeds: Sequence[Feeds]) -> int:
    """About how many rows values inside have: tokens, or of what is no text the frames of all entries."""
    return sum(
        batch["input_ids"].numel() if "input_ids" in batch else max(t.numel() // t.shape[1] for t in batch.values())
        for batch in feeds
    )


def check_same_model(captured: CapturedModel, manifest: Manifest, folder: Path, *, transformed: bool) -> None:
    """Refuse a reference that is not the model that was exported, as far as can be told.

    Compared are kind, sizes, names and shapes of the quantized linears, and the values of tensors that the file keeps.

    Args:
        transformed: the export changed float tensors on purpose, so they are not compared.

    Raises:
        InputError: something differs.
    """
    remedy = "Give the model that was exported"
    place = captured.folder.name if captured.folder else "the reference"

    def refuse(why: str):
        raise InputError(f"is not the model in {folder}: {why}", place=place, remedy=remedy)

    if captured.kind != manifest.kind:
        refuse(f"it is a {captured.kind}, not a {manifest.kind}")
    for key in captured.settings.keys() & manifest.settings.keys():
        longer = key == "max_position_embeddings" and captured.settings[key] > manifest.settings[key]
        if captured.settings[key] != manifest.settings[key] and not longer:  # an export may read shorter texts
            refuse(f"its {key} is {captured.settings[key]}, not {manifest.settings[key]}")
    shapes = {found.name: found.shape for block in captured.blocks for found in linears(block.module.graph)}
    for entry in manifest.linears:
        if entry.name not in shapes:
            refuse(f"it has no linear {entry.name}")
        if tuple(shapes[entry.name]) != tuple(entry.shape):
            refuse(f"{entry.name} is {list(shapes[entry.name])}, not {list(entry.shape)}")
    names = [block.name for block in captured.blocks]
    if missing := [entry.name for entry in manifest.blocks if entry.name not in names]:
        refuse(f"it has no block {missing[0]}")
    if transformed:
        return
    parameters = {name for block in captured.blocks for name in block.parameters}
    for tensor in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer:
        dtype = _FLOATS.get(tensor.data_type)
        if tensor.name in parameters and dtype is not None and math.prod(tensor.dims) <= _COMPARED:
            read = tensor_of(tensor, folder)
            # torch takes integers from numpy in the place of what numpy lacks.
            stored = torch.from_numpy(read if FLOAT_TYPES[dtype].in_numpy else read.view(np.int16)).view(dtype)
            if not torch.equal(captured.load(tensor.name).to(stored.dtype), stored):
                refuse(f"{tensor.name} has other values")


class FloatOutputs:
    """Outputs of the float model on fixed inputs, as often as they are wanted.

    All blocks but the last run once, on all batches; what the last one reads is kept. Every call of `outputs` runs the
    last block on one batch, so that the logits of one window are in memory at a time.

    Args:
        captured: the float model.
        feeds: its inputs for each batch.
        names: public names of the outputs to produce.
    """

    def __init__(
        self,
        captured: CapturedModel,
        feeds: Sequence[Feeds],
        names: Sequence[str],
        progress: StageProgress = no_stage_progress,
    ):
        self._captured, self._last = captured, captured.blocks[-1]
        self._ports = [port for port in captured.outputs if port.name in names]
        end = len(captured.blocks)
        self._stream = stream_of(captured, feeds, keep_too={port.value: end for port in self._ports})
        for index, block in enumerate(captured.blocks[:-1]):
            progress(block.name, index, end)
            with weights_of(captured, block):
                self._stream.advance(block, index)
        with computing(self._last.name, captured.placement):
            load_block(captured, self._last)
        progress("", end, end)

    def __len__(self) -> int:
        return len(self._stream.batches)

    def outputs(self, batch: int) -> dict[str, Tensor]:
        """The wanted outputs of one batch by public name, float32 where floating, on the CPU."""
        with torch.no_grad(), computing(self._last.name, self._captured.placement):
            results = self._last.module(*self._stream.inputs(self._last, batch))
        values = self._stream.batches[batch] | dict(zip(self._last.outputs, results, strict=True))
        return {port.name: values[port.value].to(CPU) for port in self._ports}

    def close(self) -> None:
        """Drop the weights of the last block and what it reads."""
        unload(self._last.module)
        self._stream.batches.clear()


@dataclass(frozen=True)
class TeacherForcing:
    """Deployed values that take the place of float ones, a tensor for each batch.

    Attributes:
        state: what the block before hands on; None where it is unknown or there is none.
        linears: outputs of linears of this block, by name.
        rescaled: those of them whose channels are off by factors on purpose; they go on up to these factors.
    """

    state: list[Tensor] | None
    linears: Mapping[str, list[Tensor]]
    rescaled: Set[str] = frozenset()


@dataclass(frozen=True)
class BlockComparison:
    """What happened in a block, a tensor on the CPU for each batch.

    Attributes:
        linears, output: outputs of the wanted linears by name and what the block hands on, float all the way.
        own_linears: the same linears when everything in front of each has its deployed value.
        inputs, own_inputs: what these linears read in the same two runs.
        own_output: what the float block makes of the state that the deployed model hands to it.
    """

    block: Block
    linears: dict[str, list[Tensor]]
    output: list[Tensor]
    own_linears: dict[str, list[Tensor]]
    own_output: list[Tensor]
    inputs: dict[str, list[Tensor]]
    own_inputs: dict[str, list[Tensor]]


def watch(
    captured: CapturedModel, feeds: Sequence[Feeds], wanted: set[str], forced: Callable[[Block], TeacherForcing]
) -> Iterator[BlockComparison]:
    """Run the float model block by block and look at values inside.

    Args:
        wanted: names of linears, or of convolutions.
        forced: asked once for every block, before it runs.
    """
    stream, device = stream_of(captured, feeds), captured.placement.device
    state_name = ""
    for index, block in enumerate(captured.blocks):
        nodes = {found.node: found.name for found in products(block.module.graph) if found.name in wanted}
        carried, given = block.outputs.index(captured.handed_on(block)), forced(block)
        seen = BlockComparison(block, {}, [], {}, [], {}, {})
        with weights_of(captured, block):
            for batch in range(len(stream.batches)):
                inputs = dict(zip(block.inputs, stream.inputs(block, batch), strict=True))
                plain = _ComparingInterpreter(block.module, nodes, {})
                results = plain.run(*inputs.values())
                seen.output.append(results[carried].to(CPU))
                if given.state is not None and state_name in inputs:
                    inputs[state_name] = given.state[batch].to(device).float()
                    results = _ComparingInterpreter(block.module, {}, {}).run(*inputs.values())
                seen.own_output.append(results[carried].to(CPU))
                instead = {name: v[batch].to(device).float() for name, v in given.linears.items()}
                own = _ComparingInterpreter(block.module, nodes, instead, given.rescaled)
                own.run(*inputs.values())
                for name in plain.seen:
                    seen.linears.setdefault(name, []).append(plain.seen[name].to(CPU))
                    seen.own_linears.setdefault(name, []).append(own.seen[name].to(CPU))
                    seen.inputs.setdefault(name, []).append(plain.read[name].to(CPU))
                    seen.own_inputs.setdefault(name, []).append(own.read[name].to(CPU))
            stream.advance(block, index)
        yield seen
        state_name = captured.handed_on(block)


class _ComparingInterpreter(Interpreter):
    """Notes what linears read and make, and goes on with another value where there is one."""

    def __init__(
        self, module: GraphModule, nodes: Mapping[Node, str], instead: Mapping[str, Tensor],
        rescaled: Set[str] = frozenset(),
    ):  # fmt: skip
        super().__init__(module)
        self._nodes, self._instead, self._rescaled = nodes, instead, rescaled
        self.seen: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def run(self, *args):
        with torch.no_grad():
            return super().run(*args)

    def run_node(self, node: Node):
        value = super().run_node(node)
        if (name := self._nodes.get(node)) is None:
            return value
        self.seen[name], self.read[name] = value, self.fetch_args_kwargs_from_env(node)[0][0]
        if name not in self._instead:
            return value
        other = self._instead[name].reshape(value.shape)  # some files have all rows of a batch in one dimension
        if name not in self._rescaled:
            return other
        return channelwise(value.flatten(0, -2), other.flatten(0, -2)).reshape(value.shape)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All batches' rows, float32 [rows, channels]; of pictures of several widths, whose last axis is none of channels,
    every element is a row.
    """
    alike = len({t.shape[-1:] for t in tensors}) == 1
    rows = [t.float().reshape(-1, t.shape[-1] if alike and t.dim() else 1) for t in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def channelwise(want: Tensor, got: Tensor) -> Tensor:
    """`got` times the factor for each channel that brings it closest to `want`, [rows, channels]."""
    return got * channel_factors(want, got)


def channel_factors(want: Tensor, got: Tensor) -> Tensor:
    """The factor for each channel that brings `got` closest to `want`, both [rows, channels]; float32 [channels]."""
    factors = (want * got).sum(0, dtype=torch.float64) / got.square().sum(0, dtype=torch.float64).clamp_min(1e-30)
    return factors.float()
