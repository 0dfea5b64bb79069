"""Tensors of a graph that ONNX Runtime saved, written anew so that they can be used where they are mapped."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, StringStringEntryProto, TensorProto

from ..artifact.manifest import MODEL_FILE

DATA_FILE = f"{MODEL_FILE}.data"
SHARED_FILE = "shared.data"

# Packed blocks begin at the first multiple of 64 bytes in their memory. ONNX Runtime 1.31 writes a packed weight to any
# place in its file, and maps it from there: the blocks are then looked for where they are not, and results are NaN.
ALIGNMENT = 4096
_CHUNK = 1 << 24


def lay_out(saved: Path, original: Path, folder: Path) -> int:
    """Copy a saved graph, every tensor and every packed weight to a multiple of the page size.

    Tensors that the original model holds too, byte for byte, are read from a hard link to its data, where the file
    system has such links; not those with packed weights, for which ONNX Runtime looks in the file of the tensor.

    Args:
        saved: model that ONNX Runtime wrote, its tensors in DATA_FILE beside it.
        original: the model before optimization, its tensors in DATA_FILE beside it.
        folder: existing folder on the file system of `original`; gets MODEL_FILE and, where there are tensors to put
            into them, DATA_FILE and SHARED_FILE.

    Returns:
        bytes of the shared tensors.
    """
    model = onnx.load(saved, load_external_data=False)
    if not _external(model):  # a model so small that all is in one file
        onnx.save(model, folder / MODEL_FILE)
        return 0
    known = {t.name: _entries(t) for t in _external(onnx.load(original, load_external_data=False))}
    linked = bool(known) and _link(original.with_name(DATA_FILE), folder / SHARED_FILE)
    shared = 0
    with ExitStack() as stack:
        source = stack.enter_context(saved.with_name(DATA_FILE).open("rb"))
        target = stack.enter_context((folder / DATA_FILE).open("wb"))
        before = stack.enter_context((folder / SHARED_FILE).open("rb")) if linked else None
        for tensor in _external(model):
            entries = _entries(tensor)
            offset, length = _range(entries)
            packed = [entry for key, entry in entries.items() if key.startswith("prepacked")]
            twin = None if packed else known.get(tensor.name)
            if before and twin and _same(source, offset, before, *_range(twin), length):
                entries["location"].value, entries["offset"].value = SHARED_FILE, twin["offset"].value
                shared += length
                continue
            entries["location"].value = DATA_FILE
            entries["offset"].value = str(_append(source, offset, length, target))
            for entry in packed:
                entry.value = _move(entry.value, source, target)
    if linked and not shared:
        (folder / SHARED_FILE).unlink()
    onnx.save(model, folder / MODEL_FILE)
    return shared


def _external(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]


def _entries(tensor: TensorProto) -> dict[str, StringStringEntryProto]:
    return {entry.key: entry for entry in tensor.external_data}


def _range(entries: Mapping[str, StringStringEntryProto]) -> tuple[int, int]:
    """Where a tensor begins in its file, and how many bytes it has."""
    return int(entries["offset"].value), int(entries["length"].value)


def _link(file: Path, link: Path) -> bool:
    try:
        os.link(file, link)
    except OSError:
        return False  # a file system without hard links
    return True


def _move(packed: str, source: BinaryIO, target: BinaryIO) -> str:
    """Copy the blobs of a packed weight; `packed` is "key|offset;length;checksum|…", as is the result."""
    key, *blobs = packed.split("|")
    moved = [key]
    for blob in blobs:
        offset, length, checksum = blob.split(";")
        moved.append(f"{_append(source, int(offset), int(length), target)};{length};{checksum}")
    return "|".join(moved)


def _append(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> int:
    position = -(-target.tell() // ALIGNMENT) * ALIGNMENT
    target.seek(position)
    for chunk in _chunks(source, offset, length):
        target.write(chunk)
    return position


def _same(first: BinaryIO, offset: int, second: BinaryIO, twin_offset: int, twin_length: int, length: int) -> bool:
    if length != twin_length:
        return False
    pairs = zip(_chunks(first, offset, length), _chunks(second, twin_offset, length), strict=True)
    return all(one == other for one, other in pairs)


def _chunks(file: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    for start in range(offset, offset + length, _CHUNK):
        file.seek(start)
        yield file.read(min(_CHUNK, offset + length - start))
