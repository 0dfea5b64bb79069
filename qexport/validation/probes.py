"""What is read of the deployed file: values of linears and blocks, for as many blocks at a time as fit a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..artifact.manifest import BlockEntry, LinearEntry, Manifest
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.convolution_sites import products
from ..graph.edit import dtype_of, shape_of
from ..graph.sites import fold_sites, linears
from ..graph.views import operand, results_of
from .attentions import attention_results
from .feature_orders import FeatureOrders
from .reference import BlockComparison, Feeds, TeacherForcing, channelwise, flat
from .running import run_values

BUDGET = 1 << 29  # bytes of deployed values in memory at once


@dataclass(frozen=True)
class Probe:
    """A block and the values that are read of it.

    Attributes:
        linears: those that make a value.
        bytes: estimated size of these values.
        attentions: for every attention where it is, by the name of the linear that reads what comes out of it.
    """

    block: str
    linears: tuple[LinearEntry, ...]
    output: BlockEntry | None
    bytes: int
    attentions: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> list[str]:
        """Names in the file, each once: linears share one, or make the very value that their block hands on."""
        names = [entry.output for entry in self.linears] + ([self.output.output] if self.output else [])
        return list(dict.fromkeys([*self.inputs(), *names]))

    def inputs(self) -> dict[str, list[str]]:
        """The linears that read each value, by its name in the file."""
        readers: dict[str, list[str]] = {}
        for entry in self.linears:
            if entry.input:
                readers.setdefault(entry.input, []).append(entry.name)
        return readers


def make_probes(captured: CapturedModel, manifest: Manifest, rows: int) -> list[Probe]:
    """What to read of every block, in the order of the model; rows: tokens or batch entries over all batches."""
    outputs = {entry.name: entry for entry in manifest.blocks}
    found = []
    for block in captured.blocks:
        nodes = {product.name: product.node for product in products(block.module.graph)}
        entries = tuple(entry for entry in manifest.readable if entry.name in nodes)
        carried = results_of(block.module.graph)[block.outputs.index(captured.handed_on(block))]
        output = outputs.get(block.name) if dtype_of(carried).is_floating_point else None
        read = [nodes[entry.name] for entry in entries] + ([carried] if output else [])
        # One for every value of the file: inputs that are one value here may be several there.
        read += [operand(nodes[names[0]]) for names in Probe(block.name, entries, None, 0).inputs().values()]
        size = sum(_bytes(shape_of(node), rows) for node in read)
        found.append(Probe(block.name, entries, output, size, attention_results(block.module.graph)))
    return found


def _bytes(shape: Sequence[int | str], rows: int) -> int:
    fixed = [size for size in shape if isinstance(size, int)]
    return 4 * int(np.prod(fixed, dtype=np.int64)) * (rows if len(fixed) < len(shape) else 1)


def in_groups(found: Sequence[Probe], budget: int) -> list[list[Probe]]:
    """Consecutive blocks whose values fit the budget together; a block that does not fit is a group of its own."""
    groups: list[list[Probe]] = []
    size = 0
    for probe in found:
        if not probe.values():
            continue
        if not groups or size + probe.bytes > budget:
            groups.append([])
            size = 0
        groups[-1].append(probe)
        size += probe.bytes
    return groups


class DeployedValues:
    """Deployed values, those of one group of blocks at a time.

    Args:
        feeds: the model's inputs by public name, one dict for each batch; rows: of every value, over all of them.
        transformed: the export folded factors into linears; see `ValueComparison.rescaled`.
        budget: bytes of deployed values in memory at once.

    Attributes:
        groups: the blocks whose values are read at once.
        probe: of the block entered last.
        values: by name in the file, a tensor for each batch, features in the order of the float model.
        orders: in which order the file has them.
        state: what the block before handed on, kept across groups; None where it is unknown.
        behind: linears whose channels smoothing may have divided by factors, by the readers that take these back.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds], *, rows: int,
        transformed: bool, threads: int | None = None, provider: str | None = None, budget: int = BUDGET,
    ):  # fmt: skip
        self.groups = in_groups(make_probes(captured, manifest, rows), budget)
        self._places = {probe.block: (probe, group) for group in self.groups for probe in group}
        self._run = partial(run_values, folder, manifest, feeds=feeds, threads=threads, provider=provider)
        self._transformed = transformed
        self.orders = FeatureOrders(manifest.readable)
        self.behind: dict[str, str] = {}
        self.values: dict[str, list[Tensor]] = {}
        self.state: list[Tensor] | None = None
        self.probe = Probe("", (), None, 0)

    def enter(self, block: str) -> Probe:
        """Go on to a block, in order; the values of its group are there when this returns."""
        self.probe, group = self._places.get(block, (Probe(block, (), None, 0), ()))
        if group and self.probe is group[0]:
            self.values = {}  # before the next ones come
            read = self._run(list(dict.fromkeys(value for member in group for value in member.values())))
            self.values = {name: [self.orders.natural(name, t) for t in tensors] for name, tensors in read.items()}
        return self.probe

    @property
    def rescaled(self) -> set[str]:
        """`ValueComparison.rescaled`: linears so far whose outputs are off by factors on purpose."""
        return set(self.behind.values())

    def forced(self, block: Block) -> TeacherForcing:
        """Go on to a block, for `watch`: its values take the place of float ones."""
        probe, state = self.enter(block.name), self.state
        if self._transformed:
            self.behind |= rescaled_in_front(block)
        values = {entry.name: self.result(entry) for entry in probe.linears}
        self.state = self.values[probe.output.output] if probe.output else None
        return TeacherForcing(state, values, self.rescaled)

    def error(self, entry: LinearEntry, seen: BlockComparison) -> Tensor:
        """What a linear's result is off by itself, [rows, channels], in the scale of the float model."""
        want, got = flat(seen.own_linears[entry.name]), flat(self.result(entry))
        return (channelwise(want, got) if entry.name in self.rescaled else got) - want

    def result(self, entry: LinearEntry) -> list[Tensor]:
        """What a linear of this block made."""
        return [value[..., slice(*(entry.columns or (None,)))] for value in self.values[entry.output]]


def rescaled_in_front(block: Block) -> dict[str, str]:
    """Linears whose channels smoothing may have divided by factors, by the readers that take these back."""
    by_node = {found.node: found.name for found in linears(block.module.graph)}
    sites = [site for site in fold_sites(block.module.graph) if site.kind == "rows"]
    made = [(by_node[site.producer], site.consumers) for site in sites if site.producer is not None]
    return {reader.name: producer for producer, consumers in made for reader in consumers}
