"""Low-rank branches whose factors are inputs of the file: adapters that are switched while it runs.

Beside a product y of x comes x A B, with A [K, r] and B [r, N] as inputs that are empty by default: r is 0 then, and
the sum adds zeros. Linears that share a product share its branch: A has the rows of each behind one another, B is block
diagonal, so that one pair of small products serves q, k and v. The scale s is in B.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from ..artifact import checksums
from ..artifact.adapter_files import SUFFIX, adapter_path, read_adapter, write_adapter
from ..artifact.dtypes import FLOATS
from ..artifact.files import link_or_copy
from ..artifact.manifest import MODEL_FILE, LinearEntry, Manifest
from ..errors import InputError
from ..graph.sites import module_of_call
from ..models.lora import Adapter, Change

_REMEDY = "Merge it: --adapter DIR"


@dataclass(frozen=True)
class _Branch:
    """A branch beside a product.

    Attributes:
        node: of the product; input, output: what it reads and, with bias, makes.
        width: of its input; outputs: of its result; dtype: element type of both.
        linears: that it computes.
    """

    node: str
    input: str
    output: str
    width: int
    outputs: int
    linears: tuple[LinearEntry, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What A and B are called."""
        return f"{self.node}.lora_A", f"{self.node}.lora_B"


def check_kept(adapter: Adapter) -> None:
    """Refuse what is no low-rank branch.

    Raises:
        InputError: as said.
    """
    for change in adapter.changes.values():
        if not change.low or change.magnitude or change.embedding or change.instead:
            what = "a DoRA" if change.magnitude else "more than a low-rank product"
            raise InputError(
                f"{change.module} has {what}, and only changes of linears can be kept apart", place=adapter.name,
                remedy=_REMEDY,
            )  # fmt: skip


def keep_adapters(folder: Path, manifest: Manifest, adapters: Mapping[str, Adapter]) -> Manifest:
    """Add branches to the file in `folder`, and write a file for every adapter; returns the manifest that names them.

    Args:
        adapters: by the name that each is switched by.

    Raises:
        InputError: an adapter changes what is no linear with a value of its own.
    """
    if manifest.settings.get("prompts_from"):
        raise InputError("a file with a branch for prompts cannot take adapters", place="adapter", remedy=_REMEDY)
    changes = {name: {c.module: c for c in found.changes.values()} for name, found in adapters.items()}
    model, changed = onnx.load(folder / MODEL_FILE, load_external_data=False), set().union(*changes.values())
    found = [*_branches(manifest), *_float_branches(model.graph, changed)]
    modules = {module_of_call(entry.name) for branch in found for entry in branch.linears}
    for name, of in changes.items():
        if other := [module for module in of if module not in modules]:
            raise InputError(
                f"changes {other[0]}, which is not a linear with an input of its own in the file",
                place=adapters[name].name, remedy=_REMEDY,
            )  # fmt: skip
    branches = [b for b in found if any(module_of_call(e.name) in changed for e in b.linears)]
    dtype = FLOATS[manifest.dtype]
    _insert(model.graph, branches, dtype.onnx)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    for name, adapter in adapters.items():
        tensors: dict[str, np.ndarray] = {}
        for branch in branches:
            low, high = _factors(branch, changes[name], adapter)
            pair = zip(branch.names, (low, high), strict=True)
            tensors |= {key: tensor.numpy().astype(manifest.dtype) for key, tensor in pair}
        write_adapter(folder / f"{name}{SUFFIX}", tensors)
    return manifest.model_copy(update={"adapters": tuple(adapters)})


def with_adapter_inside(folder: Path, manifest: Manifest, name: str, into: Path) -> None:
    """An export whose factors are those of one adapter, and no inputs any more; its other files are links.

    Raises:
        InputError: it has no such adapter.
    """
    factors = read_adapter(adapter_path(folder, name, manifest.adapters))
    for file in folder.iterdir():
        if file.is_file() and file.name not in (MODEL_FILE, checksums.FILE):
            link_or_copy(file, into / file.name)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    inputs = [value for value in model.graph.input if value.name not in factors]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name not in factors]
    made = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in factors.items()]
    for field, kept in (("input", inputs), ("initializer", [*tensors, *made])):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(copies)
    (into / MODEL_FILE).write_bytes(model.SerializeToString())


def _branches(manifest: Manifest) -> Iterator[_Branch]:
    """One for every product of the file."""
    products: dict[str, list[LinearEntry]] = {}
    for entry in manifest.readable:
        if entry.input:
            products.setdefault(entry.node, []).append(entry)
    for node, entries in products.items():
        first = entries[0]
        ends = [entry.columns[1] if entry.columns else entry.shape[0] for entry in entries]
        yield _Branch(node, first.input, first.output, first.shape[1], max(ends), tuple(entries))


def _float_branches(graph: onnx.GraphProto, modules: Set[str]) -> Iterator[_Branch]:
    """One for every product of a linear that stays float: it has the name of its module, and no others share it."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        weight = shapes.get(node.input[1], ()) if node.op_type == "MatMul" else ()
        if len(weight) == 2 and module_of_call(node.name) in modules:
            k, n = weight
            entry = LinearEntry(
                name=node.name, scheme="float", input=node.input[0], output=node.output[0], node=node.name,
                kernel="MatMul", shape=(n, k),
            )  # fmt: skip
            yield _Branch(node.name, node.input[0], node.output[0], k, n, (entry,))


def _insert(graph: onnx.GraphProto, branches: Sequence[_Branch], kind: int) -> None:
    nodes: list[NodeProto] = []
    made = {branch.output: branch for branch in branches}
    for node in graph.node:
        own = NodeProto()
        own.CopyFrom(node)
        nodes.append(own)
        for index, name in enumerate(own.output):
            if name in made:
                own.output[index] = f"{name}.base"
                nodes += _of_branch(made[name])
    del graph.node[:]
    graph.node.extend(nodes)
    for number, branch in enumerate(branches):
        low, high = branch.names
        rank = f"rank_{number}"
        shapes: dict[str, tuple[list[int | str], list[int]]] = {
            low: ([branch.width, rank], [branch.width, 0]), high: ([rank, branch.outputs], [0, branch.outputs]),
        }  # fmt: skip
        for name, (dims, empty) in shapes.items():
            graph.input.append(helper.make_tensor_value_info(name, kind, dims))
            graph.initializer.append(TensorProto(name=name, dims=empty, data_type=kind, raw_data=b""))


def _of_branch(branch: _Branch) -> list[NodeProto]:
    low, high = branch.names
    return [
        helper.make_node("MatMul", [branch.input, low], [f"{low}.result"], f"{low}.product"),
        helper.make_node("MatMul", [f"{low}.result", high], [f"{high}.result"], f"{high}.product"),
        helper.make_node("Add", [f"{branch.output}.base", f"{high}.result"], [branch.output], f"{branch.node}.lora"),
    ]


def _factors(branch: _Branch, changes: Mapping[str, Change], adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A [K, r] and B [r, N] of all linears of a product."""
    lows, highs = [torch.zeros(branch.width, 0)], [torch.zeros(0, branch.outputs)]
    for entry in branch.linears:
        if (change := changes.get(module_of_call(entry.name))) is None:
            continue
        low, high = adapter.read(change.low).float(), adapter.read(change.high).float()
        if high.shape[0] != entry.shape[0] or low.shape[1] != entry.shape[1]:
            raise InputError(f"has other sizes for {entry.name} than the base", place=adapter.name, remedy=_REMEDY)
        wide = torch.zeros(len(low), branch.outputs)
        wide[:, slice(*(entry.columns or (None,)))] = _in_order(change.scale * high.t(), entry.makes_order)
        lows.append(_in_order(low, entry.reads_order).t())
        highs.append(wide)
    return torch.cat(lows, 1), torch.cat(highs)


def _in_order(factor: Tensor, order: np.ndarray | None) -> Tensor:
    """A factor [r, features] for features that the file has in another order."""
    return factor if order is None else factor[:, torch.from_numpy(order)]
