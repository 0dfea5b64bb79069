"""Activations that travel from block to block while a model is quantized, batch by batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, Self, overload

import torch
from torch.fx import GraphModule, Interpreter, Node

from .. import ranks
from ..artifact.cache_names import is_past
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import HOST, Placement, products_in
from ..errors import InputError, NumericsError, QExportError
from ..graph.edit import is_call
from ..graph.execution import Executor, skipping
from ..passes.base import Batch
from ..quant.observers import AbsmaxObserver, ChannelAbsmax, CompositeObserver, Statistic
from .sources import Samples

Feeds = Mapping[str, torch.Tensor]  # the model's inputs by public name


class Stream:
    """The values that blocks not yet run will need, for every calibration batch.

    Args:
        batches: for each batch, the model's inputs by value name.
        masks: for each batch the real tokens, [batch, sequence] bool, or None for no padding; afterwards None too where
            every token is real, because picking rows out of values costs as much as some products.
        keep: for each value name the index of the last block that reads it.
        placement: where blocks are computed, and where values wait for them.
        counted: for each batch which of the real tokens sums and samples are taken of; None for all of them. Extremes
            are always those of all.

    Attributes:
        products: what matrices are multiplied as while blocks run, see `device.products_in`.
    """

    def __init__(
        self,
        batches: Sequence[dict[str, torch.Tensor]],
        masks: Sequence[torch.Tensor | None],
        keep: dict[str, int],
        placement: Placement = HOST,
        counted: Sequence[torch.Tensor | None] | None = None,
    ):
        self.device, self._between, self._keep = placement.device, placement.between, keep
        self.batches = [{name: _moved(value, self._between) for name, value in batch.items()} for batch in batches]
        self.masks = [_where_padded(mask, self.device) for mask in masks]
        own = self.masks if counted is None else counted
        self.counted = [_where_padded(mask, self.device) for mask in own]
        self.products = "float32"

    def multiplied_in(self, products: str) -> Self:
        """This one, with other `products`."""
        self.products = products
        return self

    def shared_out(self) -> Self:
        """Only the batches that are this process's, where several make one export.

        Raises:
            InputError: there are fewer than processes.
        """
        count = len(self.batches)
        if count < ranks.size():
            raise InputError(
                f"{count} batches for {ranks.size()} processes", place="calibration",
                remedy="Take more samples, a smaller calibration.batch_size, or fewer processes",
            )  # fmt: skip
        own = ranks.share(count)
        self.batches, self.masks, self.counted = self.batches[own], self.masks[own], self.counted[own]
        return self

    def inputs(self, block: Block, batch: int) -> tuple[torch.Tensor, ...]:
        """What a block reads of a batch, where it is computed."""
        return tuple(_moved(self.batches[batch][name], self.device) for name in block.inputs)

    def advance(self, block: Block, index: int) -> None:
        """Run a block on every batch, keep its outputs and drop what no later block reads."""
        run = Executor(block.module)
        for number, values in enumerate(self.batches):
            with products_in(self.products):
                results = run(*self.inputs(block, number))
            for name, result in zip(block.outputs, results, strict=True):
                if self._keep.get(name, -1) > index:
                    values[name] = _moved(result, self._between)
            for name in [n for n in values if self._keep.get(n, -1) <= index]:
                del values[name]


class Reference(Protocol):
    """Values of the float model, which go on from block to block: a `Stream`, or what was kept of one.

    Attributes:
        batches: for each batch, by name; among them is what the block before hands on.
    """

    batches: list[dict[str, torch.Tensor]]

    def advance(self, block: Block, index: int) -> None:
        """Go on to what is there behind a block."""


def _where_padded(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    """A value on a device; sizes, which are plain numbers, are everywhere."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def last_readers(captured: CapturedModel) -> dict[str, int]:
    """For each value that blocks read, the index of the last one that does."""
    return {name: index for index, block in enumerate(captured.blocks) for name in block.inputs}


def stream_of(
    captured: CapturedModel,
    feeds: Sequence[Feeds],
    masks: Sequence[torch.Tensor | None] | None = None,
    keep_too: Mapping[str, int] = MappingProxyType({}),
    counted: Sequence[torch.Tensor | None] | None = None,
) -> Stream:
    """The values that the first blocks read, for each batch.

    Args:
        feeds: the model's inputs by public name; masks, counted: as `Stream` takes them, None for no padding anywhere.
        keep_too: values to keep longer than any block reads them, see `Stream`.
    """
    keep = last_readers(captured)
    batches = [{port.value: batch[port.name] for port in captured.inputs if port.value in keep} for batch in feeds]
    return Stream(batches, masks or [None] * len(batches), keep | dict(keep_too), captured.placement, counted)


def make_stream(captured: CapturedModel, samples: Samples, batch_size: int) -> Stream:
    """The model's inputs for calibration samples, cache empty."""
    masks = samples.attention_mask.split(batch_size)
    pairs = zip(samples.input_ids.split(batch_size), masks, strict=True)
    return stream_of(captured, [decoder_inputs(captured, *pair) for pair in pairs], [mask.bool() for mask in masks])


def decoder_inputs(captured: CapturedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """All inputs of a decoder for a prompt [batch, sequence] without a past, by public name."""
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    for port in captured.inputs:
        if is_past(port.name):
            feeds[port.name] = port.empty(ids.shape[0])
    return feeds


def module_feeds(
    captured: CapturedModel, inputs: Sequence[Sequence[torch.Tensor] | Mapping[str, torch.Tensor]], place: str
) -> list[dict[str, torch.Tensor]]:
    """Inputs of an nn.Module by public name, one batch for each tuple (in the order of its ports) or mapping.

    Raises:
        InputError: one does not fit the model; `place` says whose they are.
    """
    found = []
    for index, given in enumerate(inputs):
        where, names = f"{place}[{index}]", [port.name for port in captured.inputs]
        if isinstance(given, torch.Tensor):
            given = (given,)
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise InputError(f"has {', '.join(given)}, and the model takes {', '.join(names)}", place=where)
        elif len(given) != len(names):
            raise InputError(f"{len(given)} tensors, and the model takes {len(names)}", place=where)
        else:
            given = dict(zip(names, given, strict=True))
        for port in captured.inputs:
            tensor = given[port.name]
            fits = tensor.dim() == len(port.dims) and all(
                isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, port.dims, strict=True)
            )
            if tensor.dtype != port.dtype or not fits:
                raise InputError(
                    f"{port.name} is {tensor.dtype} {list(tensor.shape)}, not {port.dtype} {list(port.dims)}",
                    place=where,
                )
        found.append({name: given[name] for name in names})
    return found


def collect(
    block: Block, stream: Stream, module: GraphModule, wanted: Mapping[Node, Callable[[], Any]]
) -> dict[Node, Any]:
    """Run all batches through a block and show each wanted value's real rows to its statistic.

    Args:
        wanted: what makes the statistic of a value, a `quant.observers.Statistic`.
    """
    statistics = {node: factory() for node, factory in wanted.items()}
    unneeded = skipping(module.graph, wanted)
    for number, masks in enumerate(zip(stream.masks, stream.counted, strict=True)):
        with torch.no_grad(), products_in(stream.products):
            _StatisticsInterpreter(module, statistics, *masks).run(
                *stream.inputs(block, number), initial_env=dict(unneeded)
            )
    ranks.combine(list(statistics.values()))
    return statistics


class _StatisticsInterpreter(Interpreter):
    def __init__(
        self, module: GraphModule, statistics: Mapping[Node, Statistic], mask: torch.Tensor | None,
        counted: torch.Tensor | None,
    ):  # fmt: skip
        super().__init__(module)
        self._statistics, self._mask, self._counted = statistics, mask, counted

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if node in self._statistics:
            rows = _rows(node, value, self._mask).float()
            counted = rows if self._counted is self._mask else _rows(node, value, self._counted).float()
            try:
                _show(self._statistics[node], rows, counted)
            except QExportError as error:
                error.place = error.place or node.name
                raise
        return value


def _rows(node: Node, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows of a value that a mask leaves, [rows, channels]."""
    if mask is not None and value.shape[:-1] == mask.shape:
        return value[mask]
    if _is_cached(node):  # [batch, heads, tokens, features]: the features of every head are channels
        by_token = value.transpose(1, 2)
        return (by_token.flatten(0, 1) if mask is None else by_token[mask]).flatten(1)
    return value.flatten(0, -2)


def _show(statistic: Statistic, rows: torch.Tensor, counted: torch.Tensor) -> None:
    """Let a statistic see rows: one of extremes all of them, any other those that are counted."""
    if isinstance(statistic, CompositeObserver):
        for part in statistic.parts:
            _show(part, rows, counted)
    else:
        statistic.update(rows if isinstance(statistic, AbsmaxObserver | ChannelAbsmax) else counted)


def _is_cached(node: Node) -> bool:
    """Whether a value is what attention keeps as keys or values."""
    return any(
        is_call(user, torch.ops.qexport.cached_attention.default) and node in user.args[1:3] for user in node.users
    )


@dataclass(frozen=True)
class _Batches(Sequence[Batch]):
    """The calibration batches of a block, brought to where it is computed one at a time."""

    block: Block
    stream: Stream
    reference: Reference | None
    compared: str | None

    def __len__(self) -> int:
        return len(self.stream.masks)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        mask, target, output = self.stream.masks[index], None, 0
        if self.reference is not None and self.compared is not None:
            target = _moved(self.reference.batches[index][self.compared], self.stream.device)
            output = self.block.outputs.index(self.compared)
        fits = target is not None and mask is not None and target.shape[: mask.dim()] == mask.shape
        return Batch(self.stream.inputs(self.block, index), target, output, mask if fits else None)


def batches(
    captured: CapturedModel, block: Block, stream: Stream | None, reference: Reference | None
) -> Sequence[Batch]:
    """The calibration batches of a block that `reference` has passed and `stream` has not."""
    if stream is None:
        return []
    name = None if reference is None else _compared(captured, block, reference)
    return _Batches(block, stream, reference, name)


def _compared(captured: CapturedModel, block: Block, reference: Reference) -> str | None:
    """The value that a block hands on, where `reference` has it and it is of floating point."""
    name = captured.handed_on(block)
    value = reference.batches[0].get(name)
    return name if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def sqnr(captured: CapturedModel, block: Block, stream: Stream, reference: Reference) -> float | None:
    """SQNR in dB of the value that a block hands on, over the real tokens of all batches.

    Returns:
        None where there is no such value or no error.

    Raises:
        NumericsError: NaN or Inf.
    """
    name = _compared(captured, block, reference)
    if name is None or name not in stream.batches[0]:
        return None
    signal = noise = 0.0
    for mask, given, original in zip(stream.masks, stream.batches, reference.batches, strict=True):
        got, want = given[name].to(stream.device), original[name].to(stream.device)
        if mask is not None and got.shape[: mask.dim()] == mask.shape:
            got, want = got[mask], want[mask]
        signal += want.double().square().sum().item()
        noise += (got - want).double().square().sum().item()
    signal, noise = (sum(part) for part in zip(*ranks.gather((signal, noise)), strict=True))
    if not math.isfinite(noise):
        raise NumericsError("produces NaN or Inf on the calibration data", place=block.name)
    return round(10 * math.log10(signal / noise), 2) if signal and noise else None
