"""Every quantized linear and every block of the deployed file beside the float model.

The deployed values come out of the deployed file: a temporary model.onnx that names them as additional outputs lies
next to it and shares its data. Values are read for a few blocks at a time, as many as fit a memory budget.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from ..capture.blocks import Block
from ..capture.graph import Captured
from ..errors import InputError, RuntimeProblem
from ..numerics.metrics import cosine, sqnr_db
from ..passes.edit import shape_of
from ..passes.sites import fold_sites, linears
from ..runtime.branches import PROMPTS, only
from ..runtime.manifest import MODEL_FILE, BlockEntry, LinearEntry, Manifest
from ..runtime.session import OptimizedGraph, open_session, optimized_graph, unfused
from .attentions import attentions
from .faults import with_faults
from .noise import Noise, weight_faults
from .placement import expected, moved, placed
from .ranges import input_range, static_limits
from .record import branch_gains
from .reference import Feeds, Forced, Progress, Watched, channelwise, watch
from .report import Layers, Row

BUDGET = 1 << 29  # bytes of deployed values in memory at once
_DTYPES = {  # of what a session takes, by the names that it has for types
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
    "tensor(int8)": torch.int8, "tensor(uint8)": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A block and the values that are read of it.

    Attributes:
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


def probes(captured: Captured, manifest: Manifest, rows: int) -> list[Probe]:
    """What to read of every block, in the order of the model; rows: tokens or batch entries over all batches."""
    outputs = {entry.name: entry for entry in manifest.blocks}
    found = []
    for block in captured.blocks:
        nodes = {linear.name: linear.node for linear in linears(block.module.graph)}
        entries = tuple(entry for entry in manifest.linears if entry.name in nodes)
        results = block.module.graph.output_node().args[0]
        carried = results[block.outputs.index(captured.handed_on(block))]
        output = outputs.get(block.name) if carried.meta["spec"].dtype.is_floating_point else None
        read = [nodes[entry.name] for entry in entries] + ([carried] if output else [])
        # One for every value of the file: inputs that are one value here may be several there.
        read += [nodes[names[0]].args[0] for names in Probe(block.name, entries, None, 0).inputs().values()]
        size = sum(_bytes(shape_of(node), rows) for node in read)
        found.append(Probe(block.name, entries, output, size, attentions(block.module.graph)))
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


def compare_layers(
    folder: Path, manifest: Manifest, captured: Captured, feeds: Sequence[Feeds], plain: OptimizedGraph, *,
    rows: int, transformed: bool, threads: int | None = None, provider: str | None = None, budget: int = BUDGET,
    progress: Progress | None = None,
) -> Layers:  # fmt: skip
    """Compare the values of an export with the float model's on the same inputs.

    Args:
        feeds: the model's inputs by public name, one dict for each batch.
        plain: the optimized graph of the deployed file.
        rows: tokens (or batch entries, for models without text) in all batches.
        transformed: the export folded factors into linears; see `Row.rescaled`.
        budget: bytes of deployed values in memory at once.

    Raises:
        InputError: the folder cannot be written, or its file lacks a value of the manifest.
        RuntimeProblem: ONNX Runtime fails.
    """
    groups = in_groups(probes(captured, manifest, rows), budget)
    everything = [value for group in groups for probe in group for value in probe.values()]
    with with_outputs(folder, everything) as path:
        # Additional outputs can only prevent fusions: where all of them leave a linear its operator, some do.
        strayed = moved(plain, optimized_graph(path, manifest, provider=provider), manifest)
    deployed = Deployed(groups, lambda values: run_values(folder, manifest, values, feeds, threads, provider))
    limits = static_limits(folder)
    noise = Noise(folder, manifest, limits, threads, provider)
    behind: dict[str, str] = {}
    linear_rows: dict[str, Row] = {}
    block_rows, attention_rows, ranges = [], [], []
    rescaled: set[str] = set()

    def forced(block: Block) -> Forced:
        probe, state = deployed.enter(block.name), deployed.state
        if transformed:
            behind.update(rescaled_in_front(block))
            rescaled.update(behind.values())
        values = {entry.name: deployed.result(entry) for entry in probe.linears}
        deployed.state = deployed.values[probe.output.output] if probe.output else None
        return Forced(state, values, rescaled)

    for index, seen in enumerate(watch(captured, feeds, {e.name for e in manifest.linears}, forced)):
        if progress:
            progress(seen.block.name, index, len(captured.blocks))
        probe = deployed.probe
        faults = weight_faults(captured, probe.linears, seen, deployed.values, noise, rescaled, transformed)
        for entry in probe.linears:
            row = _linear_row(entry, deployed.result(entry), seen, entry.name in rescaled)
            linear_rows[entry.name] = row.model_copy(update={"fault": faults.get(entry.name, "")})
            if entry.input and (name := probe.attentions.get(entry.name)):
                want, own = seen.inputs[entry.name], seen.own_inputs[entry.name]
                # Factors of v's channels, or of a Mul behind, are taken back by the linear.
                measures = _measures(want, own, deployed.values[entry.input], transformed)
                attention_rows.append(Row(name=name, block=probe.block, rescaled=transformed, **measures))
        for value, names in probe.inputs().items():
            got = deployed.values[value]
            ranges.append(input_range(probe.block, names, seen.inputs[names[0]], got, limits.get(value)))
        if probe.output is not None:
            measures = _measures(seen.output, seen.own_output, deployed.values[probe.output.output])
            block_rows.append(Row(name=probe.block, block=probe.block, **measures))
    if progress:
        progress("", len(captured.blocks), len(captured.blocks))
    gains = branch_gains(folder)
    found = [
        placed(linear_rows[entry.name], entry, plain).model_copy(update={"branch_gain_db": gains.get(entry.name)})
        for entry in manifest.linears
    ]
    wrong = {
        e.name: f"{there or 'nothing'} instead of {expected(e, there)}" for e, there in unfused(plain, manifest.linears)
    }
    return Layers(
        tokens=rows, linears=with_faults(found, ranges, wrong, behind), blocks=tuple(block_rows),
        sessions=len(groups), moved=strayed, attentions=tuple(attention_rows), ranges=tuple(ranges),
    )  # fmt: skip


class Deployed:
    """Deployed values, those of one group of blocks at a time.

    Attributes:
        probe: of the block entered last.
        values: by name in the file, a tensor for each batch.
        state: what the block before handed on, kept across groups; None where it is unknown.
    """

    def __init__(self, groups: Sequence[Sequence[Probe]], run: Callable[[list[str]], dict[str, list[Tensor]]]):
        self._groups = {probe.block: (probe, group) for group in groups for probe in group}
        self._run = run
        self.values: dict[str, list[Tensor]] = {}
        self.state: list[Tensor] | None = None
        self.probe = Probe("", (), None, 0)

    def enter(self, block: str) -> Probe:
        """Go on to a block, in order; the values of its group are there when this returns."""
        self.probe, group = self._groups.get(block, (Probe(block, (), None, 0), ()))
        if group and self.probe is group[0]:
            self.values = {}  # before the next ones come
            self.values = self._run([value for member in group for value in member.values()])
        return self.probe

    def result(self, entry: LinearEntry) -> list[Tensor]:
        """What a linear of this block made."""
        return [value[..., slice(*(entry.columns or (None,)))] for value in self.values[entry.output]]


def rescaled_in_front(block: Block) -> dict[str, str]:
    """Linears whose channels smoothing may have divided by factors, by the readers that take these back."""
    by_node = {found.node: found.name for found in linears(block.module.graph)}
    sites = [site for site in fold_sites(block.module.graph) if site.kind == "rows"]
    return {reader.name: by_node[site.producer] for site in sites for reader in site.consumers}


def _linear_row(entry: LinearEntry, value: list[Tensor], seen: Watched, rescaled: bool) -> Row:
    measures = _measures(seen.linears[entry.name], seen.own_linears[entry.name], value, rescaled)
    return Row(name=entry.name, block=entry.block, scheme=entry.scheme, rescaled=rescaled, **measures)


def _measures(want: list[Tensor], own: list[Tensor], value: list[Tensor], rescaled: bool = False) -> dict[str, float]:
    got, want = flat(value), flat(want)
    own = flat(own)
    measures = compare(want, channelwise(want, got) if rescaled else got)
    return measures | {"own_sqnr_db": sqnr_db(own, channelwise(own, got) if rescaled else got)}


def compare(want: Tensor, got: Tensor) -> dict[str, float]:
    """sqnr_db, cosine and max_abs_error of two tensors of one shape."""
    return {
        "sqnr_db": sqnr_db(want, got),
        "cosine": cosine(want, got),
        "max_abs_error": float((want - got).abs().max()),
    }


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All batches' rows, float32 [rows, channels]."""
    rows = [t.float().reshape(-1, t.shape[-1]) for t in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


@contextmanager
def with_outputs(folder: Path, values: Sequence[str]):
    """Path of a model.onnx with additional outputs, beside the same data; it is gone after the `with`.

    Of a file with branches it has the one for prompts alone: what is inside of a branch cannot be an output.

    Raises:
        InputError: the folder cannot be written, or the graph has no such value.
    """
    model = only(onnx.load(folder / MODEL_FILE, load_external_data=False), PROMPTS)
    graph = model.graph
    known = {output for node in graph.node for output in node.output} | {value.name for value in graph.input}
    if missing := [value for value in values if value not in known]:
        raise InputError(
            f"has no value {missing[0]}, which the manifest names",
            place=str(folder / MODEL_FILE),
            remedy="Export the model again",
        )
    present = {output.name for output in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in present)
    with beside(folder, model) as path:
        yield path


@contextmanager
def beside(folder: Path, model: onnx.ModelProto):
    """Path of a model that shares the data of the one in the folder; it is gone after the `with`.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        # In the same folder, because ONNX Runtime refuses data that lie, or are linked, outside of the model's folder.
        handle, name = tempfile.mkstemp(dir=folder, prefix=".probe.", suffix=".onnx")
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", place=str(folder), remedy="Copy it to a folder you own"
        ) from error
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)


def run_values(
    folder: Path, manifest: Manifest, values: list[str], feeds: Sequence[Feeds],
    threads: int | None, provider: str | None,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """Values of the deployed file by name, a tensor for each batch."""
    with with_outputs(folder, values) as path:
        session = open_session(path, manifest, threads=threads, provider=provider)
    results: dict[str, list[Tensor]] = {value: [] for value in values}
    for batch in feeds:
        for name, array in run_session(session, batch, values).items():
            results[name].append(array)
    return results


def run_session(session: ort.InferenceSession, feeds: Feeds, names: Sequence[str]) -> dict[str, Tensor]:
    """Run a session on tensors by public name and return the named outputs.

    Raises:
        RuntimeProblem: ONNX Runtime fails.
    """
    binding, held = session.io_binding(), []
    for value in session.get_inputs():
        tensor = feeds[value.name]
        if tensor.numel() == 0 and isinstance(value.shape[-1], int):  # an empty cache, of codes it may be half as wide
            tensor = tensor.reshape(*tensor.shape[:-1], value.shape[-1])
        held.append(_as_value(tensor.to(_DTYPES.get(value.type, tensor.dtype))))  # whose memory a binding does not keep
        binding.bind_ortvalue_input(value.name, held[-1])
    for name in names:
        binding.bind_output(name, "cpu")
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime has one exception class for each status code and no base class
        raise RuntimeProblem(f"the model fails on the validation inputs: {error}") from error
    return {name: torch.from_dlpack(value) for name, value in zip(names, binding.get_outputs(), strict=True)}


def _as_value(tensor: Tensor) -> ort.OrtValue:
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    bits = tensor.view(torch.int16).numpy()  # numpy has no bfloat16
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
