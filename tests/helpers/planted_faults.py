"""Faults planted in a finished export, by editing its ONNX file and the data beside it; its checksums are made anew."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from qexport.artifact import checksums
from qexport.artifact.manifest import LinearEntry

MODEL, KIND = "model.onnx", "QuantizeLinear"


def change(folder: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Let `edit` change a tensor in place, wherever it lies."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, shape = folder / place["location"], tuple(tensor.dims)
        data = np.memmap(path, dtype, "r+", offset=int(place["offset"]), shape=shape)
        edit(data)
        data.flush()
    else:
        data = numpy_helper.to_array(tensor).copy()
        edit(data)
        tensor.CopyFrom(numpy_helper.from_array(data, name))
        (folder / MODEL).write_bytes(model.SerializeToString())
    checksums.write(folder)


def wrong_scale(folder: Path, entry: LinearEntry) -> None:
    """Four groups, each of a channel of its own, four times too large."""

    def edit(scale: np.ndarray) -> None:
        first = entry.columns[0] if entry.columns else 0
        for step in range(4):
            scale[first + 3 + 5 * step, step % scale.shape[1]] *= 4

    change(folder, f"{entry.node}.weight_scale.blocks", edit)


def swapped_zero_points(folder: Path, entry: LinearEntry) -> None:
    """The two zero points of each byte in each other's place."""

    def edit(packed: np.ndarray) -> None:
        rows = packed[slice(*(entry.columns or (None,)))]
        rows[:] = (rows >> 4) | (rows << 4)

    change(folder, f"{entry.node}.weight_zero_point.packed", edit)


def _weight(folder: Path, entry: LinearEntry) -> tuple[str, slice]:
    """The name of the packed codes that a node reads, and the rows that are the linear's."""
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    node = next(n for n in graph.node if n.name == entry.node)
    return node.input[1], slice(*(entry.columns or (None,)))


def swapped_rows(folder: Path, entry: LinearEntry) -> None:
    """The codes of two channels in each other's place."""
    name, rows = _weight(folder, entry)

    def edit(codes: np.ndarray) -> None:
        own = codes[rows]
        own[[2, 9]] = own[[9, 2]]

    change(folder, name, edit)


def swapped_nibbles(folder: Path, entry: LinearEntry) -> None:
    """The two codes of each byte in each other's place."""
    name, rows = _weight(folder, entry)

    def edit(codes: np.ndarray) -> None:
        own = codes[rows]
        own[:] = (own >> 4) | (own << 4)

    change(folder, name, edit)


def zeroed_group(folder: Path, entry: LinearEntry) -> None:
    """One group of one channel with a scale of zero."""

    def edit(scale: np.ndarray) -> None:
        scale[(entry.columns[0] if entry.columns else 0) + 4, 1] = 0

    change(folder, f"{entry.node}.weight_scale.blocks", edit)


def shifted_scales(folder: Path, entry: LinearEntry) -> None:
    """The scales of every channel one group further."""

    def edit(scale: np.ndarray) -> None:
        own = scale[slice(*(entry.columns or (None,)))]
        own[:] = np.roll(own, 1, axis=1)

    change(folder, f"{entry.node}.weight_scale.blocks", edit)


def unfused(folder: Path, entry: LinearEntry) -> None:
    """A product in float32 with what the codes stand for, where one with 4-bit codes was planned."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    node = next(n for n in model.graph.node if n.name == entry.node)
    tensors = {t.name: t for t in model.graph.initializer}
    codes, scale = (numpy_helper.to_array(tensors[name], str(folder)) for name in node.input[1:3])
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float32) - 8
    weight = (nibbles * scale.reshape(*codes.shape[:2], 1)).reshape(len(codes), -1)[:, : entry.shape[1]]
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), "in_float"))
    node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], "in_float"], list(node.output), name=node.name))
    (folder / MODEL).write_bytes(model.SerializeToString())
    checksums.write(folder)


def clipped_input(folder: Path, entry: LinearEntry) -> None:
    """The scale of an input, eight times too small."""

    def edit(scale: np.ndarray) -> None:
        scale /= 8

    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    change(folder, next(n.input[1] for n in graph.node if entry.input in n.input[:1] and n.op_type == KIND), edit)


def coarse_input(folder: Path, entry: LinearEntry) -> None:
    """The scale of an input, eight times too large."""

    def edit(scale: np.ndarray) -> None:
        scale *= 8

    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    change(folder, next(n.input[1] for n in graph.node if entry.input in n.input[:1] and n.op_type == KIND), edit)


def factor_on_a_channel(folder: Path, entry: LinearEntry) -> None:
    """The scale of one whole channel, four times too large."""

    def edit(scale: np.ndarray) -> None:
        scale[(entry.columns[0] if entry.columns else 0) + 7] *= 4

    change(folder, f"{entry.node}.weight_scale", edit)
